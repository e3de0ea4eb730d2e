"""gradsmith's kernels are what a run trains, validates, evaluates and generates with."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from conftest import losses

from gradsmith import ranks
from gradsmith.data.prepared import PreparedData
from gradsmith.errors import UserError
from gradsmith.evaluation.generate import complete
from gradsmith.evaluation.measure import measure
from gradsmith.models.build import load_for_inference
from gradsmith.recipe import Recipe
from gradsmith.report.build import build_report
from gradsmith.run import Run, read_json
from gradsmith.tasks import make_task
from gradsmith.training import engine as engines
from gradsmith.training import loop
from gradsmith.training.session import build

Tiny = Callable[..., Recipe]

# What kinds of attention there are: grouped heads and a window; alternating windows and a softcap;
# no rotary positions.
MODELS = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 9, "head_dim": 16},
    "gemma2": {
        "num_key_value_heads": 1,
        "sliding_window": 9,
        "attn_logit_softcapping": 5.0,
        "head_dim": 16,
    },
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ROTARY = {"attention", "glu", "linear_cross_entropy", "rms_norm", "rope"}
OPS = dict.fromkeys(MODELS, ROTARY)
OPS["gpt2"] = {"attention", "layer_norm", "linear_cross_entropy"}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def model(architecture: str) -> dict[str, object]:
    sizes = {k: v for k, v in SIZES.items() if architecture != "gpt2" or k != "intermediate_size"}
    return {"architecture": architecture, "config": {**sizes, **MODELS[architecture]}}


def ops_called(work: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        work()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("architecture", MODELS)
def test_the_loss_curve_is_that_of_torch(tiny: Tiny, architecture: str) -> None:
    settings = {"training.precision": "fp32", "training.steps": 20, "data.packing": True}
    runs = {}
    for kernels in (True, False):
        runs[kernels] = tiny(
            str(kernels), **settings, **{"model": {**model(architecture), "kernels": kernels}}
        )
        loop.train(runs[kernels])
    ours, torchs = losses(runs[True]), losses(runs[False])
    assert torchs[-1] < torchs[0] - 0.2
    assert ours == pytest.approx(torchs, abs=1e-3)

    ours_in, torchs_in = (Run(runs[kernels].output) for kernels in (True, False))
    replaced = read_json(ours_in.provenance_path)["accelerate"]["replaced"]
    assert {op for op, _ in replaced.values()} - {"linear"} == OPS[architecture]  # that is AMX's
    assert {backend for _, backend in replaced.values()} == {"cpu"}
    assert read_json(ours_in.provenance_path)["accelerate"]["memory"] is True
    assert "accelerate" not in read_json(torchs_in.provenance_path)
    for run, named in ((ours_in, True), (torchs_in, False)):
        report = build_report([run], run.report_path).read_text(encoding="utf-8")
        for op in (*{op for op, _ in replaced.values()}, "attention"):
            assert (f"{op} under the model" in report) == named
        assert ("freed memory" in report) == named


@pytest.mark.parametrize("stage", [1, 3])
def test_every_phase_uses_it(tiny: Tiny, stage: int) -> None:
    settings = {"training.steps": 2, "training.validate.every": 2, "training.zero.stage": stage}
    recipe = tiny("run", **settings)
    ranks.init_distributed()
    session = build(recipe, Run(recipe.output), fresh=False)
    engines.set_learning_rate(session.engine, 1e-3)
    step = ops_called(lambda: loop.optimizer_step(session))
    ops = {"gradsmith::attention", "gradsmith::glu", "gradsmith::rms_norm"}
    assert ops | {f"{op}_backward" for op in ops} <= step
    ops.add("gradsmith::rope")  # which is its own backward pass
    assert ops <= step
    assert "aten::scaled_dot_product_attention" not in step
    assert ops <= ops_called(lambda: loop.validate(session))

    loop.train(recipe)
    trained, tokenizer = load_for_inference(recipe.output)
    data = PreparedData.open(Run(recipe.output).data)
    processor = data.processor(recipe)
    task, rows = make_task(recipe, processor), processor.dataset(data.split("test"))
    prompts = [[1, 5, 9], [1, 7, 8, 9, 10]]  # of two lengths, so that one is padded

    def answer() -> object:
        return complete(
            trained, tokenizer, prompts, max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0
        )

    for work in (lambda: measure(task, trained, rows, batch=2, limit=2), answer):
        found = ops_called(work)
        assert ops <= found
        assert "aten::scaled_dot_product_attention" not in found


def test_a_checkpoint_names_no_attention_of_ours(tiny: Tiny) -> None:
    recipe = tiny("run", **{"training.steps": 2})
    loop.train(recipe)
    (folder,) = Run(recipe.output).checkpoints.glob("step-*")
    written = json.loads((folder / "model" / "config.json").read_text())
    assert "gradsmith" not in json.dumps(written)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_whose_documents_would_leak_is_not_packed(tiny: Tiny, kernels: bool) -> None:
    """opt of transformers 5.23 does not hand the positions to its masks."""
    config = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    del config["intermediate_size"]
    settings = {
        "model": {"architecture": "opt", "config": config, "kernels": kernels},
        "training.steps": 2,
    }
    with pytest.raises(UserError, match=r"data\.packing: found true.*see each other"):
        loop.train(tiny("packed", **settings))
    loop.train(tiny("alone", **settings, **{"data.packing": False}))
