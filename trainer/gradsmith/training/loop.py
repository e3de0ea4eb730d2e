"""The training loop. `train` builds everything, `_train` is the loop; the rest serves it.

The loss of a step is Σ nll / N over the *global* batch, where N counts its target tokens: how the
batch is split over micro-batches and ranks, and how its documents are packed, changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..checks import check_recipe
from ..console import TrainingProgress, duration, quiet, say
from ..data.loader import Batch, Loader, evaluation_batches
from ..data.packing import Sequences
from ..data.prepare import ensure_data
from ..data.shards import PreparedData
from ..errors import RunError, Stopped, UserError, system_error
from ..evaluation.metrics import SUMS, batch_sums, summarize
from ..files import read_json, write_json
from ..models.base import pin
from ..models.build import build_model
from ..recipe import Recipe
from ..run import Run, check_output
from ..tasks.language_modeling.examine import METRICS
from . import checkpoint, guards
from . import engine as engines


def train(recipe: Recipe, *, fresh: bool | str = False) -> dict[str, Any]:
    """Trains what the recipe describes, going on from the newest checkpoint in its run's folder.

    Call it in every process of a launch (or in one alone).

    Args:
        recipe: what to train.
        fresh: start over: forget the checkpoints and metrics in the run's folder. A text is an
            order that is carried out once, however often the same command is started.

    Returns:
        The last training row of metrics.jsonl, and the last validation as `validation`.

    Raises:
        UserError: the recipe does not fit this machine, or not the run that is there.
        RunError: training failed, or was stopped by a signal after it had saved.
    """
    run, rank = Run(recipe.output), engines.rank()
    check_output(recipe)
    run.claim()  # before anything is written there, a log for example
    with quiet(run.logs / f"rank-{rank}.log"):
        check_recipe(recipe, engines.world(), fresh=bool(fresh))
        engines.init_distributed()
        with run.lock() if rank == 0 else contextlib.nullcontext():
            session = _build(recipe, run, fresh)
            # Until here a signal ends the process at once: there is nothing to save.
            try:
                with guards.StopRequest() as stop:
                    return _train(session, stop)
            except OSError as error:
                saved = checkpoint.newest_in_words(run)
                raise RunError(f"{system_error(error)}; {saved}") from error


@dataclass
class Session:
    """All that the loop needs."""

    recipe: Recipe
    run: Run
    data: PreparedData
    tokenizer: dict[str, bytes]  # its files, which go into every checkpoint
    loader: Loader
    engine: Any
    total: int | None  # steps, or None when time is the limit
    fused_loss: bool = False  # whether the model computes its loss without its logits
    step: int = 0  # done
    saved: int = 0  # the step of the newest checkpoint, or 0
    tokens: int = 0  # read, without padding
    seconds: float = 0.0  # spent in steps, on rank 0's clock: not in validations and checkpoints

    @property
    def held_out(self) -> bool:
        """Whether there is a validation split."""
        return bool(self.data.manifest["splits"]["validation"]["documents"])

    def progress(self) -> float:
        """The share of the run that is done, from which the learning rate follows."""
        if self.total is not None:
            return self.step / self.total
        minutes = self.recipe.training.minutes
        assert minutes is not None
        return min(1.0, self.seconds / (60 * minutes))

    def state(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "world": engines.world(),
            "zero_stage": self.recipe.training.zero.stage,
            "data": self.data.fingerprint,
            "tokenizer": self.data.tokenizer_fingerprint,
        }


# ---------------------------------------------------------------------------------- the loop


def _train(session: Session, stop: guards.StopRequest) -> dict[str, Any]:
    recipe, run, engine = session.recipe, session.run, session.engine
    settings, divergence = recipe.training, guards.Divergence(recipe.training.precision == "fp16")
    minutes = settings.minutes if session.total is None else None
    logged = (session.tokens, session.seconds)
    row: dict[str, Any] = {}
    due, crowded = False, True  # a checkpoint is to be written; there may be more than are kept
    with TrainingProgress(
        recipe.name, session.total, session.step, minutes=minutes, metrics=METRICS
    ) as bar:
        while (progress := session.progress()) < 1:
            began = time.monotonic()
            rate = learning_rate(recipe, progress)
            engines.set_learning_rate(engine, rate)
            loss, norm, stopping = optimizer_step(session, stop.signal is not None)
            session.tokens += session.loader.tokens(session.step)
            session.step += 1
            # Validations and checkpoints do not count: the schedule would jump over their time.
            session.seconds = _agree(session.seconds + time.monotonic() - began)
            sound = divergence.check(session.step, loss, norm)
            if sound and crowded:
                # Not when it was written: a bad step may be the last one in the newest checkpoint,
                # and shows in the step that follows.
                _keep_newest(session)
                crowded = False
            if session.step % settings.log.every == 0 or session.step == session.total:
                tokens, seconds = session.tokens - logged[0], session.seconds - logged[1]
                row = {
                    "kind": "train",
                    "step": session.step,
                    "tokens": session.tokens,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "tokens_per_second": tokens / seconds,
                    "time": session.seconds,
                } | ({} if sound else {"skipped": True})
                _log(run, row)
                bar.update(session.step, row)
                logged = (session.tokens, session.seconds)
            if session.held_out and session.step % settings.validate_.every == 0:
                bar.update(session.step, validate(session))
            due = due or stopping or session.step % settings.checkpoint.every == 0
            if due and sound:  # while steps are skipped none is written, and none deleted
                _save(session)
                due, crowded = False, True
            if stopping:
                raise Stopped(
                    f" after step {session.step}"
                    + ("" if sound else ", which was skipped and is not saved")
                    + f"; the same command goes on from {_saved(session)}",
                    stop.signal or signal.SIGTERM,  # another rank was asked
                )
        _finish(session, divergence, row, bar)
    return {
        **(row or _last_row(run, "train") or {}),
        "validation": _last_row(run, "validation"),
    }


def _finish(
    session: Session,
    divergence: guards.Divergence,
    row: dict[str, Any],
    bar: TrainingProgress,
) -> None:
    """The last checkpoint and validation.

    Raises:
        RunError: the run has diverged, now or when its last step was made by another process.
    """
    run = session.run
    last = row or _last_row(run, "train") or {}
    if divergence.standing or (not row and last.get("skipped")):
        raise RunError(
            f"step {session.step}, the last, was skipped, since its loss or gradient was not "
            f"finite: the run has diverged, and is not saved. {guards.ADVICE}"
        )
    if session.saved != session.step:
        _save(session)
    validation = _last_row(run, "validation")
    if session.held_out and (validation is None or validation["step"] != session.step):
        validation = validate(session)
        bar.update(session.step, validation)
    if validation is not None and not math.isfinite(validation["loss"]):
        raise RunError(
            f"step {session.step}: the validation loss is {validation['loss']}: the run has "
            f"diverged. {guards.ADVICE}"
        )
    _keep_newest(session)
    if engines.rank() == 0:
        _describe(session)


def optimizer_step(session: Session, asked_to_stop: bool = False) -> tuple[float, float, bool]:
    """One step of the optimizer on one global batch.

    Returns:
        The loss in nats per target token of the global batch, the gradient's norm before
        clipping, and whether any rank was asked to stop.
    """
    engine, recipe, loader = session.engine, session.recipe, session.loader
    rank, world = engines.rank(), engines.world()
    targets = loader.target_tokens(session.step)
    seed_step(recipe.seed, session.step, rank)
    total = torch.zeros(2, dtype=torch.float64)
    total[1] = asked_to_stop
    batches = loader.micro_batches(
        session.step, rank=rank, world=world, micro_batch=recipe.training.micro_batch
    )
    for batch in batches:
        nll = nll_sum(engine, batch, session.fused_loss)
        total[0] += nll.detach().double().cpu()
        # DeepSpeed averages over the ranks; times the number of ranks that is the sum.
        engine.backward(nll * (world / max(1, targets)), scale_wrt_gas=False)
        engine.step()
    dist.all_reduce(total := total.to(engines.device()))
    own = engines.clips_itself(recipe)
    norm = float(engine.basic_optimizer.grad_norm if own else engine.get_global_grad_norm())
    if norm < 0:  # DeepSpeed's word for a gradient that is not finite
        norm = math.nan
    return float(total[0]) / max(1, targets), norm, bool(total[1])


def nll_sum(model: Any, batch: Batch, fused: bool = False) -> torch.Tensor:
    """Σ −log p(target) over a micro-batch, in float32; a scalar that can be differentiated.

    Packed documents do not see each other: positions restart at each of them, and without a
    cache transformers derives from the positions where attention has to stop.

    Args:
        fused: the model's own loss is computed without the logits (`accelerate` has seen to that).
    """
    device = engines.device()
    inputs = {
        "input_ids": batch.input_ids.to(device),
        "position_ids": batch.position_ids.to(device),
        "use_cache": False,
    }
    labels = batch.labels.to(device)
    if fused:
        # transformers' words for: these labels are shifted already, and divide their sum by 1.
        loss: torch.Tensor = model(
            **inputs, labels=labels, shift_labels=labels, num_items_in_batch=1
        ).loss
        return loss
    logits = model(**inputs).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate at a share `progress` of the run: a linear rise, then the schedule's fall."""
    peak, schedule = recipe.training.optimizer.lr, recipe.training.schedule
    if progress < schedule.warmup:
        total = recipe.training.steps
        first = 1 / total if total else schedule.warmup / 100  # the first step moves too
        return peak * min(1.0, (progress + first) / schedule.warmup)
    x = (progress - schedule.warmup) / (1 - schedule.warmup)
    fall = {"constant": 0.0, "linear": x, "cosine": 0.5 * (1 - math.cos(math.pi * x))}
    return peak * (1 - (1 - schedule.final) * fall[schedule.name])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds dropout as a function of (seed, step, rank), so a resumed run needs no RNG state."""
    entropy = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(entropy >> np.uint64(1)))


def validate(session: Session) -> dict[str, Any]:
    """Metrics on the first held-out sequences, over all ranks, as a row of metrics.jsonl."""
    settings, rank, world = session.recipe.training, engines.rank(), engines.world()
    sequences = _sequences(session.recipe, session.data, "validation")
    token_bytes = torch.from_numpy(np.asarray(session.data.token_bytes(), dtype=np.int64))
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    session.engine.eval()
    batches = evaluation_batches(
        sequences,
        rank=rank,
        world=world,
        batch=settings.micro_batch,
        limit=settings.validate_.sequences,
    )
    with engines.averaged_weights(session.engine):
        for batch in batches:
            total += batch_sums(session.engine, batch, token_bytes)
    session.engine.train()
    dist.all_reduce(total := total.to(engines.device()))
    metrics = summarize(total.cpu())
    row = {
        "kind": "validation",
        "step": session.step,
        "tokens": session.tokens,
        "loss": metrics["loss"],
        "bits_per_byte": metrics["bits_per_byte"],
        "accuracy": metrics["accuracy"],
        "time": session.seconds,
    }
    _log(session.run, row)
    return row


# ---------------------------------------------------------------------------------- building


def _build(recipe: Recipe, run: Run, fresh: bool | str) -> Session:
    data = _first(lambda: _open(recipe, run, fresh))
    if data is None:  # another rank prepared it
        data = PreparedData.open(run.data)
    # Rank 0 has settled what auto stands for, so that machines that differ train alike.
    asked, recipe = recipe.training.precision, engines.settle_precision(recipe, run.recipe())
    tokenizer = data.tokenizer_files()
    sequences = _sequences(recipe, data, "train")
    guards.check_data(data, sequences)
    loader = Loader(sequences, seed=recipe.seed, global_batch=recipe.training.global_batch)
    start = _agree_on_checkpoint(run)
    model = build_model(recipe, data, start)
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    guards.check_space(run.folder, trainable, total, recipe)
    engine = engines.build_engine(recipe, model)
    session = Session(recipe, run, data, tokenizer, loader, engine, total_steps(recipe, loader))
    kernels = _kernels(recipe, session.engine.module)
    placed = kernels.get("accelerate", {}).get("replaced", {}).values()
    session.fused_loss = any(op == "linear_cross_entropy" for op, _ in placed)
    if recipe.data.packing:
        session.engine.eval()
        guards.check_packing(session.engine)
    session.engine.train()  # transformers loads models for inference, without their dropout
    if start is not None:
        _resume(session, start)
    if engines.rank() == 0:
        price = engines.precision_price(recipe)
        run.rewind_metrics(session.step)
        run.write_provenance(
            parameters=total,
            trainable_parameters=trainable,
            world=engines.world(),
            threads=torch.get_num_threads(),
            zero=recipe.dump()["training"]["zero"],
            seconds=session.seconds,
            precision={"asked": asked, "price": price},
            **kernels,
        )
        say(_headline(session, total, trainable, asked))
        if price:
            say(f"{recipe.name}: warning: {price}")
    return session


def _kernels(recipe: Recipe, model: torch.nn.Module) -> dict[str, Any]:
    """Puts our kernels into the model, where it already is on its device; what runs where."""
    from gradsmith_kernels import accelerate
    from gradsmith_kernels.backends import chosen

    backends = {op: chosen(op, where) for op, where in engines.optimizer_ops(recipe).items()}
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


def _first(work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0 while the others wait; what it complains of ends all ranks alike."""
    result, complaint = None, ""
    if engines.rank() == 0:
        try:
            result = work()
        except UserError as error:
            complaint = f"2{error}"
        except RunError as error:
            complaint = f"1{error}"
        except OSError as error:
            complaint = f"1{system_error(error)}"
    told = list(complaint.encode(errors="replace"))
    letters = torch.tensor(told, dtype=torch.uint8, device=engines.device())
    size = torch.tensor([len(letters)], device=engines.device())
    dist.broadcast(size, 0)
    if count := int(size.item()):
        text = letters if engines.rank() == 0 else letters.new_empty(count)
        dist.broadcast(text, 0)
        complaint = bytes(text.tolist()).decode()
        raise (UserError if complaint[0] == "2" else RunError)(complaint[1:])
    return result


def _agree_on_checkpoint(run: Run) -> Path | None:
    """The checkpoint from which all ranks go on; rank 0 verifies its every byte.

    Raises:
        UserError: on all ranks, if there are checkpoints and every one is damaged.
    """

    def choose() -> None:
        path, complaints = checkpoint.newest(run)
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

    step = torch.full((1,), -1, dtype=torch.int64, device=engines.device())
    _first(choose)
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
    session.tokens = state["tokens"]
    session.seconds = state["seconds"]
    say(f"{session.recipe.name}: going on from {start}")
    if session.total is not None and session.step >= session.total:
        say(f"{session.step} steps are done and the recipe asks for {session.total}: none is left")


def total_steps(recipe: Recipe, loader: Loader) -> int | None:
    """The number of optimizer steps, or None when minutes limit the run."""
    training, rows = recipe.training, len(loader.sequences)
    if training.minutes is not None:
        return None
    if training.steps is not None:
        return training.steps
    if training.epochs is not None:
        return max(1, round(training.epochs * rows / training.global_batch))
    assert training.tokens is not None
    per_step = training.global_batch * float(loader.sequences.row_tokens.mean())
    return max(1, math.ceil(training.tokens / per_step))


def _sequences(recipe: Recipe, data: PreparedData, split: str) -> Sequences:
    return Sequences(
        data.split(split),
        recipe.data.sequence_length,
        recipe.data.packing,
        data.task,
        data.manifest["pad_id"],
    )


# --------------------------------------------------------------------------------- recording


def _log(run: Run, row: dict[str, Any]) -> None:
    if engines.rank() == 0:
        run.append_metrics(row)


def _save(session: Session) -> None:
    with engines.averaged_weights(session.engine):
        checkpoint.save(
            session.engine,
            session.tokenizer,
            session.run.checkpoints,
            session.step,
            session.state(),
        )
    session.saved = session.step
    dist.barrier()


def _keep_newest(session: Session) -> None:
    if engines.rank() == 0:
        checkpoint.keep_newest(session.run, session.recipe.training.checkpoint.keep)


def _agree(seconds: float) -> float:
    """Rank 0's clock, on every rank: ranks that disagree on the end would wait for each other."""
    clock = torch.tensor([seconds], dtype=torch.float64, device=engines.device())
    dist.broadcast(clock, 0)
    return float(clock)


def _saved(session: Session) -> str:
    """The newest checkpoint, for a message."""
    return f"{session.run.checkpoints}/step-{session.saved:06}" if session.saved else "the start"


def _last_row(run: Run, kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(run.read_metrics()) if row["kind"] == kind), None)


def _describe(session: Session) -> None:
    provenance = read_json(session.run.provenance_path)
    write_json(session.run.provenance_path, {**provenance, "seconds": session.seconds})
    rate = session.tokens / session.seconds if session.seconds else math.nan
    say(
        f"{session.recipe.name}: {session.step:,} steps, {session.tokens:,} tokens in "
        f"{duration(session.seconds)} ({rate:,.0f} tokens/s)"
    )


def _headline(session: Session, total: int, trainable: int, asked: str) -> str:
    recipe, world = session.recipe, engines.world()
    auto = " (auto)" if asked == "auto" else ""
    share = "" if trainable == total else f", {trainable:,} of them trained"
    rows = len(session.loader.sequences)
    return (
        f"{recipe.name}: {total:,} parameters{share}; {rows:,} sequences of "
        f"{recipe.data.sequence_length}; {recipe.training.precision}{auto}, ZeRO-"
        f"{recipe.training.zero.stage}, {world} rank{'s' * (world > 1)} x "
        f"{torch.get_num_threads()} threads"
    )
