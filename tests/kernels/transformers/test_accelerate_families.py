"""Every family of models that `accelerate` knows: what it replaces there, and that the loss and all
gradients are those of the untouched model, judged against it in float64."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny
from torch.overrides import TorchFunctionMode

from gradsmith_kernels import accelerate
from gradsmith_kernels.verify.testing import Errors, over_draws

transformers = pytest.importorskip("transformers")

BATCHES = 4
CAUSAL = {"attention": 1, "glu": 2, "linear_cross_entropy": 1, "rms_norm": 5, "rope": 2}
# How many modules each op goes under.
OPS = {
    "llama": CAUSAL,
    "mistral": CAUSAL,
    "qwen2": CAUSAL,
    "qwen3": CAUSAL | {"rms_norm": 9},  # of its queries and keys as well
    "gemma2": CAUSAL | {"rms_norm": 9},
    "gemma3": CAUSAL | {"rms_norm": 13},
    "phi3": CAUSAL,
    "phi3 partial": CAUSAL,
    "smollm3": CAUSAL | {"rope": 1},
    "gpt2": {"attention": 1, "layer_norm": 5, "linear_cross_entropy": 1},
    "bert": {"attention": 1, "layer_norm": 6},
    "modernbert": {"attention": 1, "glu": 3, "layer_norm": 8, "rope": 3},
    "vit": {"attention": 1, "layer_norm": 5},
    "dinov2": {"attention": 1, "layer_norm": 5},
    "dinov2 swiglu": {"attention": 1, "glu": 2, "layer_norm": 5},
    "convnext": {"layer_norm": 6},
}


def inputs(family, seed):
    random = torch.Generator().manual_seed(seed)
    if FAMILIES[family][2] == "ForImageClassification":
        pixels = torch.randn(2, 3, 16, 16, generator=random)
        return {"pixel_values": pixels, "labels": torch.randint(5, (2,), generator=random)}
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=random)
    return {"input_ids": tokens, "labels": torch.where(tokens % 5 == 0, -100, tokens)}


def loss_and_gradients(model, family, draw):
    """Of each batch, stacked: the errors of one have too much in common to be judged alone."""
    seeds = range(draw * BATCHES, (draw + 1) * BATCHES)
    found = [_of_a_batch(model, inputs(family, seed)) for seed in seeds]
    return {name: torch.stack([batch[name] for batch in found]) for name in found[0]}


def _of_a_batch(model, values):
    if "pixel_values" in values:
        values["pixel_values"] = values["pixel_values"].to(model.dtype)
    loss = model(**values).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return {"loss": loss.detach(), **found}


class Float64(TorchFunctionMode):
    """transformers computes norms, rotations and the loss in float32, of a float64 model too."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        kwargs = {name: widen(value) for name, value in (kwargs or {}).items()}
        return function(*map(widen, args), **kwargs)


CASES = [(family, torch.float32) for family in OPS]
CASES += [(family, torch.bfloat16) for family in ("llama", "gemma3", "phi3", "modernbert", "vit")]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_untouched_model(family, dtype):
    def draw(number):
        """The errors with other weights and batches."""
        model = tiny(family, dtype, number)
        accelerated = copy.deepcopy(model)
        report = accelerate(accelerated)
        found = Counter(op for op, _ in report.replaced.values())
        found.pop("linear", None)  # there on AMX alone
        assert found == OPS[family]
        assert {backend for _, backend in report.replaced.values()} == {"cpu"}
        assert [*accelerated.state_dict()] == [*model.state_dict()]

        naive, ours = (loss_and_gradients(m, family, number) for m in (model, accelerated))
        report.undo()
        again = loss_and_gradients(accelerated, family, number)
        assert all(torch.equal(again[name], naive[name]) for name in naive)
        with Float64():
            exact = loss_and_gradients(model.double(), family, number)
        assert ours.keys() == naive.keys() == exact.keys()
        # The batches of a draw share its weights: as elements they count once.
        return {
            name: replace(Errors.of(ours[name], naive[name], value), numel=value[0].numel())
            for name, value in exact.items()
        }

    wrong = [
        f"{name}: {errors}, bound {errors.bound('cpu'):.2e}"
        for name, errors in over_draws(draw, "cpu").items()
        if errors.relative[0] > errors.bound("cpu")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_generation_with_a_cache_gives_the_same_tokens(family):
    model = tiny(family).eval()
    accelerated = copy.deepcopy(model)
    accelerate(accelerated)
    tokens = inputs(family, 0)["input_ids"]
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    options = {"attention_mask": padding, "max_new_tokens": 12, "do_sample": False}
    ours, theirs = (m.generate(tokens, **options) for m in (accelerated, model))
    assert theirs.shape[1] > tokens.shape[1] + 5
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_of_transformers_has_the_same_losses(tmp_path, precision):
    pytest.importorskip("accelerate")
    rows = torch.randint(3, VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(2))
    dataset = [{"input_ids": row, "labels": row} for row in rows]

    def losses(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=8, logging_steps=1,
            learning_rate=1e-2, gradient_accumulation_steps=2, gradient_checkpointing=True,
            bf16=precision == "bf16", use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, label_names=["labels"],
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=dataset, eval_dataset=dataset[:8]
        )
        trainer.train()
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return [*found, trainer.evaluate()["eval_loss"]]

    model = tiny("llama")
    accelerated = copy.deepcopy(model)
    accelerate(accelerated)
    ours, theirs = losses(accelerated), losses(model)
    assert len(ours) == 9
    assert theirs[7] < theirs[0] - 0.1
    assert ours == pytest.approx(theirs, abs=2e-4 if precision == "fp32" else 2e-2)
