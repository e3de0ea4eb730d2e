"""The loss of transformers' causal models without their logits."""

import copy
import inspect

import pytest
import torch
from models import tiny
from torch import nn

from gradsmith_kernels import accelerate

transformers = pytest.importorskip("transformers")

CHANGES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3": {},
    "phi3": {},
    "smollm3": {},
    "gpt2": {},
}


def fuse(model):
    return accelerate(model, only=["linear_cross_entropy"])


TOKENS = torch.arange(40).reshape(2, 20) % 47 + 3
LABELS = torch.where(TOKENS % 5 == 0, -100, TOKENS)


def loss_and_gradients(model, **options):
    output = model(input_ids=TOKENS, **({"labels": LABELS} | options))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return output, torch.autograd.grad(output.loss, parameters)


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 7, "shift_labels": LABELS}], ids=str
)
@pytest.mark.parametrize("family", CHANGES)
def test_loss_and_gradients_are_those_of_the_untouched_model(family, options):
    model = tiny(family, **CHANGES[family])
    expected, gradients = loss_and_gradients(model, **options)
    assert fuse(model).replaced == {"lm_head": ("linear_cross_entropy", "cpu")}
    output, ours = loss_and_gradients(model, **options)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_logits_are_there_where_they_are_asked_for():
    model = tiny()
    fuse(model)
    assert model(input_ids=TOKENS).logits.shape == (2, 20, 50)
    assert model(input_ids=TOKENS, labels=LABELS, logits_to_keep=20).logits is not None
    assert model(input_ids=TOKENS, labels=LABELS, return_dict=False)[1].shape == (2, 20, 50)
    model.eval()
    assert model(input_ids=TOKENS, labels=LABELS).logits.shape == (2, 20, 50)
    assert model.generate(TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 22)


def test_names_signature_and_undo(tmp_path):
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    report = fuse(model)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.architectures == ["LlamaForCausalLM"]
    assert fuse(model).left_alone == {"lm_head": "already accelerated"}
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_hooks_of_deepspeed_on_lm_head_run_around_the_loss():
    """They gather the weight and let it go again."""
    model, seen = tiny(), []

    def before(_, arguments):
        seen.append(arguments[0].shape)

    def after(_, arguments, output):
        seen.append(output.shape)

    before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.lm_head.register_forward_pre_hook(before)
    model.lm_head.register_forward_hook(after)
    fuse(model)
    loss_and_gradients(model)
    assert seen == [(2, 20, 32), ()]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_on_lm_head_see_the_logits_and_may_change_them(kind, late):
    def result(accelerated):
        model, seen = tiny(), []

        def hook(_, *given):
            tensor = given[-1][0] if isinstance(given[-1], tuple) else given[-1]
            seen.append(tensor.shape)
            return None if "backward" in kind else tensor / 2

        if accelerated and late:
            assert fuse(model).replaced
        getattr(model.lm_head, f"register_{kind}_hook")(hook)
        if accelerated and not late:
            assert fuse(model).replaced
        return *loss_and_gradients(model), seen

    (expected, gradients, seen), (output, ours, ours_seen) = result(False), result(True)
    assert ours_seen == seen
    assert seen[0][:2] == (2, 20)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    assert all(torch.equal(one, other) for one, other in zip(ours, gradients, strict=True))


def test_a_loss_that_is_given_later_is_the_loss():
    model = tiny()
    fuse(model)
    usual = model(input_ids=TOKENS, labels=LABELS).loss
    model.loss_function = lambda logits, *_, **__: logits.mean() + 40
    output = model(input_ids=TOKENS, labels=LABELS)
    assert torch.equal(output.loss, output.logits.mean() + 40)
    del model._loss_function
    assert torch.equal(model(input_ids=TOKENS, labels=LABELS).loss, usual)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
def test_logits_are_capped_where_transformers_caps_them(family):
    model = tiny(family, final_logit_softcapping=0.01)
    expected, _ = loss_and_gradients(model)
    fuse(model)
    output, _ = loss_and_gradients(model)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)


def test_under_autocast_it_computes_in_that_dtype():
    model = tiny()
    twin = copy.deepcopy(model)
    fuse(twin)
    with torch.autocast("cpu", torch.bfloat16):
        expected, theirs = loss_and_gradients(model)
        output, ours = loss_and_gradients(twin)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-3, atol=1e-3)
    assert ours[-1].dtype == theirs[-1].dtype == torch.float32
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=5e-2, atol=1e-3)


def test_what_is_left_alone_is_named():
    def why(model):
        report = fuse(model)
        assert report.replaced == {}
        return report.left_alone["lm_head"]

    assert "GraniteForCausalLM is not a class" in why(tiny("granite"))
    assert "torch.float64, beyond" in why(tiny().double())
    assert "meta device" in why(tiny().to("meta"))
    custom = tiny()
    custom.loss_function = lambda *_, **__: torch.zeros(())
    assert "another loss" in why(custom)
    custom = tiny()
    custom.forward = custom.forward  # as TRL's SFTTrainer does it
    assert "a forward of its own" in why(custom)


def test_an_adapter_on_lm_head_is_left_alone_and_one_beside_it_is_not():
    peft = pytest.importorskip("peft")

    def adapted(target):
        config = peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny(), config)

    (why,) = fuse(adapted("lm_head")).left_alone.values()
    assert "its lm_head is a peft." in why
    model = adapted("q_proj")
    expected, theirs = loss_and_gradients(model)
    assert list(fuse(model).replaced) == ["base_model.model.lm_head"]
    output, ours = loss_and_gradients(model)
    torch.testing.assert_close(output.loss, expected.loss)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_comes_later_gets_its_own_forward():
    peft = pytest.importorskip("peft")
    model = tiny()
    fuse(model)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    late = peft.get_peft_model(model, config)
    assert late(input_ids=TOKENS, labels=LABELS).logits is not None
    assert isinstance(model.lm_head.base_layer, nn.Linear)
