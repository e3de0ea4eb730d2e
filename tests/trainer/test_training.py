"""The loop on one rank: what a step computes, resuming, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import losses

from gradsmith import checkpoints, ranks
from gradsmith.data.prepare import prepare
from gradsmith.errors import RunError, UserError
from gradsmith.models.build import build_model, load_for_inference
from gradsmith.recipe import Recipe
from gradsmith.run import Run
from gradsmith.training import checkpoint, loop, stopping
from gradsmith.training import engine as engines
from gradsmith.training.schedule import learning_rate
from gradsmith.training.session import Session, build

Tiny = Callable[..., Recipe]


def session(recipe: Recipe) -> Session:
    ranks.init_distributed()
    return build(recipe, Run(recipe.output), fresh=False)


def test_loss_falls_and_everything_is_written(tiny: Tiny) -> None:
    recipe = tiny("run", **{"training.steps": 30, "training.validate.every": 10})
    result = loop.train(recipe)
    run = Run(recipe.output)
    assert losses(recipe)[-1] < losses(recipe)[0] - 0.5
    assert result["step"] == 30
    assert result["validation"]["bits_per_byte"] > 0
    row = run.read_metrics()[0]
    assert set(row) >= {
        "kind", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "time",
    }  # fmt: skip
    validations = [r for r in run.read_metrics() if r["kind"] == "validation"]
    assert [r["step"] for r in validations] == [10, 20, 30]
    assert run.recipe() == recipe
    assert checkpoints.newest(run)[0] == run.checkpoints / "step-000030"
    assert not list(run.checkpoints.glob("*tmp*"))
    # no pickle anywhere in the run's folder
    suffixes = {p.suffix for p in run.folder.rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin.index", ".pkl", ".ckpt"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_is_the_textbook_step(tiny: Tiny, precision: str) -> None:
    """Against plain PyTorch: mean loss over the global batch, clipping, torch's AdamW."""
    recipe = tiny(
        "run", **{"training.precision": precision, "training.zero.stage": 0, "model.kernels": False}
    )
    s = session(recipe)
    model = build_model(recipe, s.task)
    masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    for master in masters.values():
        master.requires_grad_()
    decayed = [p for p in masters.values() if p.ndim >= 2]
    kept = [p for p in masters.values() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(3):
        rate = learning_rate(recipe, step / 6)
        engines.set_learning_rate(s.engine, rate)
        loss, norm, _ = loop.optimizer_step(s)
        s.step += 1
        batch = next(s.loader.micro_batches(step, rank=0, world=1, micro_batch=8))
        expected = s.task.loss(model, batch) / int((batch.labels["labels"] != -100).sum())
        model.zero_grad()
        expected.backward()
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad.float()
        expected_norm = torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        tolerance = {"fp32": 2e-6, "bf16": 5e-3}[precision]
        assert loss == pytest.approx(expected.item(), rel=tolerance)
        assert norm == pytest.approx(expected_norm.item(), rel=4 * tolerance)


def test_buffers_stay_float32(tiny: Tiny) -> None:
    """DeepSpeed rounds them; then training and loading would compute different rotations."""
    recipe = tiny("run", **{"training.steps": 2, "model.kernels": False})
    loop.train(recipe)
    s = session(recipe)
    assert {b.dtype for _, b in s.engine.module.named_buffers()} == {torch.float32}
    ids = torch.arange(60)[None] % 300
    loaded, _ = load_for_inference(recipe.output, kernels=False)
    with torch.no_grad():
        assert torch.equal(s.engine.module.eval()(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_gives_the_same_bits(tiny: Tiny, stage: int) -> None:
    settings = {"training.zero.stage": stage, "training.checkpoint.every": 3}
    whole = tiny("whole", **settings)
    loop.train(whole)
    part = tiny("part", **settings)
    s = session(part)
    real = loop.optimizer_step
    taken = 0

    def interrupted(session: Session, asked: bool = False) -> tuple:
        nonlocal taken
        if taken == 4:  # one step past the checkpoint, as a crash would have it
            raise KeyboardInterrupt
        taken += 1
        return real(session, asked)

    loop.optimizer_step, before = interrupted, loop.optimizer_step
    try:
        with pytest.raises(KeyboardInterrupt), stopping.StopRequest() as stop:
            loop.run(s, stop)
    finally:
        loop.optimizer_step = before
    loop.train(part)
    assert losses(part) == losses(whole)
    a, b = (
        Run(r.output).checkpoints / "step-000006/model/model.safetensors" for r in (whole, part)
    )
    assert a.read_bytes() == b.read_bytes()


def test_dropout_resumes_too(tiny: Tiny) -> None:
    settings = {
        "model.config.attention_dropout": 0.3,
        "training.checkpoint.every": 3,
        "model.kernels": False,
    }
    whole = tiny("whole", **settings)
    loop.train(whole)
    again = tiny("again", **settings)
    loop.train(again)
    import shutil

    shutil.rmtree(Run(again.output).checkpoints / "step-000006")
    loop.train(again)
    assert losses(again) == losses(whole)
    assert losses(whole) != losses_without_dropout(tiny)


def losses_without_dropout(tiny: Tiny) -> list[float]:
    plain = tiny("plain", **{"model.kernels": False})
    loop.train(plain)
    return losses(plain)


def test_finished_run_is_left_alone_and_fresh_starts_over(tiny: Tiny) -> None:
    recipe = tiny("run", **{"training.steps": 2})
    loop.train(recipe)
    before = Run(recipe.output).metrics_path.read_bytes()
    loop.train(recipe)
    assert Run(recipe.output).metrics_path.read_bytes() == before
    loop.train(recipe, fresh=True)
    assert len(losses(recipe)) == 2


def test_another_recipe_is_refused(tiny: Tiny) -> None:
    loop.train(tiny("run", **{"training.steps": 2}))
    with pytest.raises(
        UserError, match=r"(?s)training\.optimizer\.lr: 0.003 before, 0.0001 now.*--fresh"
    ):
        loop.train(tiny("run", **{"training.steps": 2, "training.optimizer.lr": 1e-4}))
    longer = tiny("run", **{"training.steps": 3})
    loop.train(longer)
    assert len(losses(longer)) == 3


def test_damaged_checkpoint_is_passed_over(tiny: Tiny) -> None:
    settings = {"training.checkpoint.every": 2}
    recipe = tiny("run", **settings)
    loop.train(recipe)
    expected = losses(recipe)
    damaged = Run(recipe.output).checkpoints / "step-000006" / "model" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    found, complaints = checkpoints.newest(Run(recipe.output))
    assert found is not None
    assert found.name == "step-000004"
    assert "SHA-256" in complaints[0]
    loop.train(recipe)
    assert losses(recipe) == expected
    # a truncated file is noticed too
    path = Run(recipe.output).checkpoints / "step-000006" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    newest = checkpoints.newest(Run(recipe.output))[0]
    assert newest is not None
    assert newest.name == "step-000004"


def test_a_failing_save_keeps_what_was_there(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("run", **{"training.steps": 2})
    loop.train(recipe)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_optimizer", full)
    with pytest.raises(RunError, match="No space left"):
        loop.train(tiny("run", **{"training.steps": 4}))
    folder = Run(recipe.output).checkpoints
    assert [p.name for p in folder.iterdir()] == ["step-000002"]


def test_eos_must_be_in_the_loss(tiny: Tiny, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"q": "what is {i}?", "a": "it is {i}"}}\n' for i in range(200)))
    recipe = tiny(
        "run",
        **{
            "data.task": "chat",
            "data.sources": [{"kind": "jsonl", "path": str(pairs), "prompt": "q", "response": "a"}],
            "data.chat.template": str(template),
        },
    )
    with pytest.raises(UserError, match="never learn to stop"):
        loop.train(recipe)


def test_non_finite_gradients_change_nothing_and_end_the_run(tiny: Tiny) -> None:
    recipe = tiny("run", **{"training.steps": 40})
    s = session(recipe)
    with torch.no_grad():
        s.engine.module.model.norm.weight[0] = float("nan")
    before = [p.detach().clone() for p in s.engine.module.parameters()]
    with pytest.raises(RunError, match="not finite"), stopping.StopRequest() as stop:
        loop.run(s, stop)
    for a, b in zip(before, s.engine.module.parameters(), strict=True):
        assert torch.equal(a, b) or a.isnan().any()


def test_sigterm_saves_and_the_same_command_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("run", **{"training.steps": 400})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    command = [sys.executable, "-m", "gradsmith", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    run = Run(recipe.output)
    while len(run.read_metrics()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "the same command goes on" in errors
    newest = checkpoints.newest(run)[0]
    assert newest is not None
    step = int(newest.name[5:])
    assert step == run.read_metrics()[-1]["step"]
    assert step < 400


def test_a_second_process_is_refused(tiny: Tiny) -> None:
    recipe = tiny("run")
    with Run(recipe.output).lock(), pytest.raises(UserError, match="in use by process"):
        loop.train(recipe)


@pytest.mark.parametrize(
    ("name", "final"), [("constant", 1e-3), ("linear", 1e-4), ("cosine", 1e-4)]
)
def test_schedule(tiny: Tiny, name: str, final: float) -> None:
    recipe = tiny(
        "run",
        **{
            "training.steps": 100,
            "training.optimizer.lr": 1e-3,
            "training.schedule": {"name": name, "warmup": 0.1, "final": 0.1},
        },
    )
    rates = [learning_rate(recipe, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(final)


@pytest.mark.parametrize("length", ["tokens", "epochs", "minutes"])
def test_lengths(tiny: Tiny, length: str) -> None:
    value = {"tokens": 2000, "epochs": 0.02, "minutes": 0.02}[length]
    recipe = tiny("run", **{"training.steps": None, f"training.{length}": value})
    result = loop.train(recipe)
    data = prepare(recipe, log=lambda _: None)
    if length == "tokens":
        assert 2000 <= result["tokens"] <= 2000 + 8 * 64
    elif length == "epochs":
        rows = len(data.processor(recipe).dataset(data.split("train")))
        assert result["step"] == max(1, round(0.02 * rows / 8))
    else:
        assert result["step"] >= 1


def test_minutes_count_steps_and_the_rate_reaches_its_end(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test: a step takes a second, a validation and a checkpoint a minute."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slowly(name: str, seconds: float) -> None:
        real = getattr(loop, name)

        def work(*arguments: object) -> object:
            now[0] += seconds
            return real(*arguments)

        monkeypatch.setattr(loop, name, work)

    slowly("optimizer_step", 1.0)
    slowly("validate", 60.0)
    slowly("_save", 60.0)
    settings = {
        "training.steps": None,
        "training.minutes": 0.5,
        "training.schedule": {"name": "linear", "warmup": 0.2, "final": 0.1},
        "training.validate.every": 4,
        "training.checkpoint.every": 10,
    }
    recipe = tiny("run", **settings)
    real = loop.optimizer_step

    def until_killed(session: Session, asked_to_stop: bool = False) -> object:
        if session.step == 15:
            raise KeyboardInterrupt
        return real(session, asked_to_stop)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(recipe)
    assert loop.train(recipe)["step"] == 30  # from the checkpoint of step 10 on, 20 seconds more
    rows = [row for row in Run(recipe.output).read_metrics() if row["kind"] == "train"]
    assert [row["time"] for row in rows] == list(range(1, 31))
    assert [row["lr"] for row in rows] == pytest.approx(
        [learning_rate(recipe, step / 30) for step in range(30)]
    )
    assert rows[-1]["lr"] < 0.1 * 3e-3 + (1 - 0.1) * 3e-3 / 20  # a step before the end of the fall


def test_activation_checkpointing_gives_the_same_losses(tiny: Tiny) -> None:
    plain, saving = tiny("plain"), tiny("saving", **{"training.activation_checkpointing": True})
    loop.train(plain)
    loop.train(saving)
    assert losses(plain) == losses(saving)


def test_offload_gives_the_same_losses(tiny: Tiny) -> None:
    for stage, offload in ((2, "optimizer"), (3, "all")):
        settings = {"training.zero.stage": stage}
        plain = tiny(f"plain{stage}{offload}", **settings)
        offloaded = tiny(f"off{stage}{offload}", **settings, **{"training.zero.offload": offload})
        loop.train(plain)
        loop.train(offloaded)
        assert losses(offloaded) == pytest.approx(losses(plain), abs=2e-3)


def test_a_rank_that_looks_too_early_does_not_validate_once_more(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 may not have written the row of the last step yet; what it has counts for all."""
    agree = ranks.agree
    monkeypatch.setattr(loop, "_last_row", lambda *_: None)  # what such a rank finds
    monkeypatch.setattr(ranks, "agree", lambda value: agree(value is False or value))  # rank 0's
    recipe = tiny("run", **{"training.steps": 4, "training.validate.every": 2})
    loop.train(recipe)
    rows = [row for row in Run(recipe.output).read_metrics() if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == [2, 4]
