"""The training loop: `train` is what the commands call, `run` is the loop.

The loss of a step is Σ terms / N over the *global* batch, where N counts them (a language model's
target tokens): how the batch is split over micro-batches and ranks, and how documents are packed,
changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .. import checkpoints, ranks
from ..checks import check_recipe
from ..console import TrainingProgress, duration, quiet, say
from ..data.processor import Batch
from ..errors import RunError, Stopped, system_error
from ..evaluation.measure import measure
from ..files import read_json, write_json
from ..recipe import Recipe
from ..run import Run, check_output
from . import checkpoint, stopping
from . import engine as engines
from .optimizers import clips_itself
from .schedule import learning_rate
from .session import Session, build

Watch = Callable[[dict[str, Any]], bool]


def train(
    recipe: Recipe, *, fresh: bool | str = False, watch: Watch | None = None
) -> dict[str, Any]:
    """Trains what the recipe describes, going on from the newest checkpoint in its run's folder.

    Call it in every process of a launch (or in one alone).

    Args:
        recipe: what to train.
        fresh: start over: forget the checkpoints and metrics in the run's folder. A text is an
            order that is carried out once, however often the same command is started.
        watch: sees each validation row on rank 0, and may end the run there by returning True.

    Returns:
        The last training row of metrics.jsonl, and the last validation as `validation`.

    Raises:
        UserError: the recipe does not fit this machine, or not the run that is there.
        RunError: training failed, or was stopped by a signal after it had saved.
    """
    folder, rank = Run(recipe.output), ranks.rank()
    check_output(recipe)
    folder.claim()  # before anything is written there, a log for example
    with quiet(folder.logs / f"rank-{rank}.log"):
        check_recipe(recipe, ranks.world(), fresh=bool(fresh))
        ranks.init_distributed()
        with folder.lock() if rank == 0 else contextlib.nullcontext():
            session = build(recipe, folder, fresh)
            # Until here a signal ends the process at once: there is nothing to save.
            try:
                with stopping.StopRequest() as stop:
                    return run(session, stop, watch)
            except OSError as error:
                saved = checkpoints.newest_in_words(folder)
                raise RunError(f"{system_error(error)}; {saved}") from error


def run(session: Session, stop: stopping.StopRequest, watch: Watch | None = None) -> dict[str, Any]:
    """Trains to the end, or until it is told to stop; see `train`."""
    recipe, folder, engine = session.recipe, session.run, session.engine
    settings, divergence = recipe.training, stopping.Divergence(recipe.training.precision == "fp16")
    minutes = settings.minutes if session.total is None else None
    unit = session.task.unit
    logged = (session.read, session.seconds, session.loader.waited)
    row: dict[str, Any] = {}
    due, crowded = False, True  # a checkpoint is to be written; there may be more than are kept
    with TrainingProgress(
        recipe.name,
        session.total,
        session.step,
        minutes=minutes,
        metrics=session.task.metrics,
        unit=unit,
    ) as bar:
        ended = session.best is not None and session.best.over
        while (progress := session.progress()) < 1 and not ended:
            began = time.monotonic()
            rate = learning_rate(recipe, progress)
            engines.set_learning_rate(engine, rate)
            loss, norm, asked = optimizer_step(session, stop.signal is not None)
            session.read += session.loader.length(session.step)
            session.step += 1
            # Validations and checkpoints do not count: the schedule would jump over their time.
            session.seconds = ranks.agree(session.seconds + time.monotonic() - began)
            sound = divergence.check(session.step, loss, norm)
            if sound and crowded:
                # Not when it was written: a bad step may be the last one in the newest checkpoint,
                # and shows in the step that follows.
                _keep_newest(session)
                crowded = False
            if session.step % settings.log.every == 0 or session.step == session.total:
                read, seconds = session.read - logged[0], session.seconds - logged[1]
                waited = session.loader.waited - logged[2]
                row = {
                    "kind": "train",
                    "step": session.step,
                    unit: session.read,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    f"{unit}_per_second": read / seconds,
                    "waiting": waited / seconds,  # the share of the time, for rows
                    "time": session.seconds,
                } | ({} if sound else {"skipped": True})
                _log(folder, row)
                bar.update(session.step, row)
                logged = (session.read, session.seconds, session.loader.waited)
            if session.held_out is not None and session.step % settings.validate_.every == 0:
                validation = validate(session)
                bar.update(session.step, validation)
                if session.best is not None and sound:
                    due = _judge(session, validation) or due
                    ended = session.best.over
                if watch is not None and ranks.agree(ranks.rank() == 0 and watch(validation)):
                    ended = True
            due = due or asked or session.step % settings.checkpoint.every == 0
            if due and sound:  # while steps are skipped none is written, and none deleted
                _save(session)
                due, crowded = False, True
            if asked:
                raise Stopped(
                    f" after step {session.step}"
                    + ("" if sound else ", which was skipped and is not saved")
                    + f"; the same command goes on from {_saved(session)}",
                    stop.signal or signal.SIGTERM,  # another rank was asked
                )
        if ended:
            bar.note(f"step {session.step}  {_why_it_ended(session)}")
        _finish(session, divergence, row, bar)
    return {
        **(row or _last_row(folder, "train") or {}),
        "validation": _last_row(folder, "validation"),
    }


def _finish(
    session: Session,
    divergence: stopping.Divergence,
    row: dict[str, Any],
    bar: TrainingProgress,
) -> None:
    """The last checkpoint and validation.

    Raises:
        RunError: the run has diverged, now or when its last step was made by another process.
    """
    folder = session.run
    last = row or _last_row(folder, "train") or {}
    if divergence.standing or (not row and last.get("skipped")):
        raise RunError(
            f"step {session.step}, the last, was skipped, since its loss or gradient was not "
            f"finite: the run has diverged, and is not saved. {stopping.ADVICE}"
        )
    validation = _last_row(folder, "validation")
    # Rank 0 writes the rows. Another may look before this step's is there, and if it then began
    # one more validation it would wait for the others without end.
    done = ranks.agree(validation is not None and validation["step"] == session.step)
    due = session.held_out is not None and not done
    if due and session.best is not None:  # before the checkpoint, which holds what it finds
        validation, due = validate(session), False
        _judge(session, validation)
        bar.update(session.step, validation)
    if session.saved != session.step:
        _save(session)
    if due:
        validation = validate(session)
        bar.update(session.step, validation)
    loss = ranks.agree(validation["loss"] if validation is not None else 0.0)
    if not math.isfinite(loss):
        raise RunError(
            f"step {session.step}: the validation loss is {loss}: the run has diverged. "
            f"{stopping.ADVICE}"
        )
    _keep_newest(session)
    if ranks.rank() == 0:
        _describe(session)


def _judge(session: Session, validation: dict[str, Any]) -> bool:
    """Whether this validation is the best so far, so that its weights are to be kept."""
    assert session.best is not None
    return session.best.update(validation[session.monitor.name], session.step)


def _why_it_ended(session: Session) -> str:
    best, metric = session.best, session.monitor
    if best is None or not best.over or best.value is None:
        return "ended by its watcher"
    return (
        f"{metric.words} has not improved in {best.since} validations; the best was "
        f"{best.value:{metric.format}} at step {best.step}"
    )


def optimizer_step(session: Session, asked_to_stop: bool = False) -> tuple[float, float, bool]:
    """One step of the optimizer on one global batch.

    Returns:
        The loss of the global batch, a mean over its items, the gradient's norm before clipping,
        and whether any rank was asked to stop.
    """
    task, engine, recipe = session.task, session.engine, session.recipe
    rank, world = ranks.rank(), ranks.world()
    items = session.loader.items(session.step) or 1
    seed_step(recipe.seed, session.step, rank)
    total = torch.zeros(2, dtype=torch.float64)
    total[1] = asked_to_stop
    if task.needs_statistics:
        task.shared = _statistics(session)
    for batch in _micro_batches(session):
        loss = task.loss(engine, batch)
        total[0] += loss.detach().double().cpu()
        # DeepSpeed averages over the ranks; times the number of ranks that is the sum.
        engine.backward(loss * (world / items), scale_wrt_gas=False)
        engine.step()
    total = ranks.add(total)
    own = clips_itself(recipe)
    norm = float(engine.basic_optimizer.grad_norm if own else engine.get_global_grad_norm())
    if norm < 0:  # DeepSpeed's word for a gradient that is not finite
        norm = math.nan
    return float(total[0]) / items, norm, bool(total[1])


def _micro_batches(session: Session) -> Iterator[Batch]:
    """This rank's part of the step's global batch, where the model is."""
    dtype = next(session.engine.parameters()).dtype
    for batch in session.loader.micro_batches(
        session.step,
        rank=ranks.rank(),
        world=ranks.world(),
        micro_batch=session.recipe.training.micro_batch,
    ):
        yield batch.to(ranks.device(), dtype)


@torch.no_grad()
def _statistics(session: Session) -> torch.Tensor:
    """What the task's loss needs to know of the whole global batch."""
    task, engine = session.task, session.engine
    found = [task.statistics(task.outputs(engine, b), b) for b in _micro_batches(session)]
    return ranks.add(torch.stack(found).sum(0))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds dropout as a function of (seed, step, rank), so a resumed run needs no RNG state."""
    entropy = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(entropy >> np.uint64(1)))


def validate(session: Session) -> dict[str, Any]:
    """Metrics on the first held-out rows, over all ranks, as a row of metrics.jsonl."""
    settings, task = session.recipe.training, session.task
    assert session.held_out is not None
    with engines.averaged_weights(session.engine):
        sums = measure(
            task,
            session.engine,
            session.held_out,
            batch=settings.micro_batch,
            limit=settings.validate_.sequences,
        )
    values = task.summarize(sums)
    row = {
        "kind": "validation",
        "step": session.step,
        task.unit: session.read,
        **{metric.name: values[metric.name] for metric in task.metrics},
        "time": session.seconds,
    }
    _log(session.run, row)
    return row


# --------------------------------------------------------------------------------- recording


def _log(folder: Run, row: dict[str, Any]) -> None:
    if ranks.rank() == 0:
        folder.append_metrics(row)


def _save(session: Session) -> None:
    with engines.averaged_weights(session.engine):
        checkpoint.save(
            session.engine,
            session.processor_files,
            session.run.checkpoints,
            session.step,
            session.state(),
        )
    session.saved = session.step
    dist.barrier()


def _keep_newest(session: Session) -> None:
    if ranks.rank() == 0:
        best = session.best.step if session.best else 0
        checkpoints.keep_newest(session.run, session.recipe.training.checkpoint.keep, best)


def _saved(session: Session) -> str:
    """The newest checkpoint, for a message."""
    return f"{session.run.checkpoints}/step-{session.saved:06}" if session.saved else "the start"


def _last_row(run: Run, kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(run.read_metrics()) if row["kind"] == kind), None)


def _describe(session: Session) -> None:
    provenance = read_json(session.run.provenance_path)
    write_json(session.run.provenance_path, {**provenance, "seconds": session.seconds})
    unit = session.task.unit
    rate = session.read / session.seconds if session.seconds else math.nan
    say(
        f"{session.recipe.name}: {session.step:,} steps, {session.read:,} {unit} in "
        f"{duration(session.seconds)} ({rate:,.0f} {unit}/s)"
    )
