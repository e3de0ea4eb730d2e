"""A run under way: what it is made of, how it is built, and how it goes on from a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.numpy import save_file

from .. import checkpoints, ranks
from ..console import bytes_in_words, say
from ..data.loader import Loader
from ..data.prepare import ensure_data
from ..data.prepared import PreparedData
from ..data.processor import Dataset
from ..errors import UserError
from ..evaluation.measure import reference
from ..files import building
from ..models.base import pin
from ..models.build import build_model
from ..precision import precision_price, settle_precision
from ..reading import reading
from ..recipe import Recipe
from ..run import Run
from ..tasks import make_task
from ..tasks.task import Metric, Task, monitored
from . import checkpoint
from . import engine as engines
from .optimizers import optimizer_ops
from .schedule import total_steps
from .stopping import Best


@dataclass
class Session:
    """All that the loop needs."""

    recipe: Recipe
    run: Run
    data: PreparedData
    processor_files: dict[str, bytes]  # they go into every checkpoint
    task: Task
    loader: Loader
    held_out: Dataset | None  # the validation split
    engine: Any
    total: int | None  # steps, or None when time is the limit
    best: Best | None = None  # where the recipe asks for the best checkpoint
    step: int = 0  # done
    saved: int = 0  # the step of the newest checkpoint, or 0
    read: int = 0  # in the task's unit: tokens without padding, images
    seconds: float = 0.0  # spent in steps, on rank 0's clock: not in validations and checkpoints

    def progress(self) -> float:
        """The share of the run that is done, from which the learning rate follows."""
        if self.total is not None:
            return self.step / self.total
        minutes = self.recipe.training.minutes
        assert minutes is not None
        return min(1.0, self.seconds / (60 * minutes))

    def state(self) -> dict[str, Any]:
        return {
            self.task.unit: self.read,
            "seconds": self.seconds,
            "world": ranks.world(),
            "zero_stage": self.recipe.training.zero.stage,
            "data": self.data.fingerprint,
            self.data.processor_name: self.data.processor_fingerprint,
            **({"best": {"metric": self.monitor.name, **self.best.state()}} if self.best else {}),
        }

    @property
    def monitor(self) -> Metric:
        """The metric that decides which checkpoint is the best."""
        return monitored(self.recipe, type(self.task))


def build(recipe: Recipe, run: Run, fresh: bool | str) -> Session:
    data = ranks.first(lambda: _open(recipe, run, fresh))
    if data is None:  # another rank prepared it
        data = PreparedData.open(run.data)
    # Rank 0 has settled what auto stands for, so that machines that differ train alike.
    asked, recipe = recipe.training.precision, settle_precision(recipe, run.recipe())
    files, processor = data.processor_files(), data.processor(recipe)
    task = make_task(recipe, processor)
    dataset = processor.dataset(data.split("train"), augment=True)
    task.check_data(data, dataset)
    loader = Loader(dataset, seed=recipe.seed, global_batch=recipe.training.global_batch)
    start = _agree_on_checkpoint(run)
    model = build_model(recipe, task, start)
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    check_space(run.folder, trainable, total, recipe)
    engine = engines.build_engine(recipe, model)
    held_out = None
    if data.manifest["splits"]["validation"]["documents"]:
        held_out = processor.dataset(data.split("validation"))
    session = Session(
        recipe, run, data, files, task, loader, held_out, engine, total_steps(recipe, loader)
    )
    kernels = _kernels(recipe, engine.module)
    placed = kernels.get("accelerate", {}).get("replaced", {}).values()
    task.fused_loss = any(op == "linear_cross_entropy" for op, _ in placed)
    engine.eval()
    task.start(engine, dataset)
    if task.needs_reference:
        _reference(session, begins=start is None)
    engine.train()  # transformers loads models for inference, without their dropout
    if start is None:
        session.best = _best(session, {})
    else:
        _resume(session, start)
    if ranks.rank() == 0:
        price = precision_price(recipe)
        run.rewind_metrics(session.step)
        run.write_provenance(
            parameters=total,
            trainable_parameters=trainable,
            world=ranks.world(),
            threads=torch.get_num_threads(),
            zero=recipe.dump()["training"]["zero"],
            seconds=session.seconds,
            precision={"asked": asked, "price": price},
            unit=task.unit,
            metrics=[asdict(metric) for metric in task.metrics],
            **kernels,
        )
        say(_headline(session, total, trainable, asked))
        if price:
            say(f"{recipe.name}: warning: {price}")
    return session


def _best(session: Session, state: dict[str, Any]) -> Best | None:
    """The best so far, where the recipe asks for one; `state` is state.json of where it goes on."""
    settings = session.recipe.training
    stop = settings.early_stopping
    if session.held_out is None or (stop is None and settings.validate_.monitor is None):
        return None
    known = state.get("best")
    if known is not None and known["metric"] != session.monitor.name:
        known = None  # the recipe looks for another best now
    greater = session.monitor.greater_is_better
    if stop is None:
        return Best(greater, state=known)
    return Best(greater, stop.patience, stop.min_delta, known)


def _reference(session: Session, begins: bool) -> None:
    """Gives the rows what the loss compares with: computed as the run begins, and then kept.

    Raises:
        UserError: a run that goes on has lost it.
    """
    run, data = session.run, session.data
    rows = {"train": session.loader.dataset, "validation": session.held_out}
    asked = {name: dataset for name, dataset in rows.items() if dataset is not None}
    known = read_reference(run, data)
    if known is None and not begins:
        raise UserError(
            f"{run.reference}: what the model said before training is gone, or is of other data; "
            "start over with --fresh, or choose another output=..."
        )
    if known is None:
        say(f"{session.recipe.name}: what the model says before training, of every row")
        batch = session.recipe.training.micro_batch
        known = {
            name: reference(session.task, session.engine, dataset, batch=batch)
            for name, dataset in asked.items()
        }
        if ranks.rank() == 0:
            with building(run.reference, "reference") as scratch:
                save_file(known, scratch / "rows.safetensors", {"data": data.fingerprint})
    for name, dataset in asked.items():
        dataset.reference = known[name]
    dist.barrier()


def read_reference(run: Run, data: PreparedData) -> dict[str, np.ndarray] | None:
    """What a run keeps of what its model said before training, by split."""
    path = run.reference / "rows.safetensors"
    if not path.is_file():
        return None
    with reading(str(path), "not readable as safetensors"), safe_open(path, "np") as file:
        if (file.metadata() or {}).get("data") != data.fingerprint:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _kernels(recipe: Recipe, model: torch.nn.Module) -> dict[str, Any]:
    """Puts our kernels into the model, where it already is on its device; what runs where."""
    from gradsmith_kernels import accelerate
    from gradsmith_kernels.backends import chosen

    backends = {op: chosen(op, where) for op, where in optimizer_ops(recipe).items()}
    if not recipe.model.kernels:
        return {"backends": backends}
    report = accelerate(model)
    placed = {
        "replaced": report.replaced,
        "left_alone": report.left_alone,
        "memory": report.memory,
    }
    return {"backends": backends, "accelerate": placed}


def _open(recipe: Recipe, run: Run, fresh: bool | str) -> PreparedData:
    """What rank 0 does before the others look into the folder."""
    run.begin(recipe, fresh)
    data = ensure_data(recipe, log=say)
    pin(run, recipe)
    return data


def _agree_on_checkpoint(run: Run) -> Path | None:
    """The checkpoint from which all ranks go on; rank 0 verifies its every byte.

    Raises:
        UserError: on all ranks, if there are checkpoints and every one is damaged.
    """

    def choose() -> None:
        path, complaints = checkpoints.newest(run)
        if path is None and complaints:
            raise UserError(
                "\n  ".join(
                    [
                        f"{run.folder}: every checkpoint is damaged, and nothing was changed; put "
                        "one back, start over with --fresh, or choose another output=...",
                        *complaints,
                    ]
                )
            )
        for complaint in complaints:
            say(f"not used: {complaint}")
        if path is not None:
            step[0] = int(path.name.removeprefix("step-"))

    step = torch.full((1,), -1, dtype=torch.int64, device=ranks.device())
    ranks.first(choose)
    dist.broadcast(step, 0)
    return None if step.item() < 0 else run.checkpoints / f"step-{int(step.item()):06}"


def _resume(session: Session, start: Path) -> None:
    with engines.averaged_weights(session.engine):
        state = checkpoint.load_optimizer(session.engine, start)
    if state["data"] != session.data.fingerprint:
        raise UserError(
            f"{session.run.data}: the data is not what {start} was trained on (its sources have "
            "changed); start over with --fresh, or choose another output=..."
        )
    session.step = session.saved = state["step"]
    session.read = state[session.task.unit]
    session.seconds = state["seconds"]
    say(f"{session.recipe.name}: going on from {start}")
    session.best = _best(session, state)
    if session.best and session.best.over:
        metric, step = session.monitor.title, session.best.step
        say(f"{metric} has not improved since step {step}: none is left")
    elif session.total is not None and session.step >= session.total:
        say(f"{session.step} steps are done and the recipe asks for {session.total}: none is left")


def _headline(session: Session, total: int, trainable: int, asked: str) -> str:
    recipe, world = session.recipe, ranks.world()
    auto = " (auto)" if asked == "auto" else ""
    share = "" if trainable == total else f", {trainable:,} of them trained"
    rows = session.task.rows_in_words(len(session.loader.dataset))
    return (
        f"{recipe.name}: {total:,} parameters{share}; {rows}; "
        f"{recipe.training.precision}{auto}, ZeRO-"
        f"{recipe.training.zero.stage}, {world} rank{'s' * (world > 1)} x "
        f"{torch.get_num_threads()} threads"
    )


def check_space(folder: Path, trainable: int, total: int, recipe: Recipe) -> None:
    """
    Raises:
        UserError: the checkpoints that the recipe keeps do not fit on the disk.
    """
    saved = trainable if recipe.model.adapter else total
    bytes_each = 12 * trainable + (4 if recipe.training.precision == "fp32" else 2) * saved
    needed = bytes_each * (recipe.training.checkpoint.keep + 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output: {folder} has {bytes_in_words(free)} free; training.checkpoint.keep "
            f"{recipe.training.checkpoint.keep} needs {bytes_in_words(needed)} "
            "(one more than is kept is there while it is written)"
        )
