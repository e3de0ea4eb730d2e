import copy

import pytest
import torch
from torch import nn

from gradsmith_kernels import accelerate

transformers = pytest.importorskip("transformers")

KINDS = {
    "llama": (transformers.LlamaConfig, 5),
    "mistral": (transformers.MistralConfig, 5),
    "qwen2": (transformers.Qwen2Config, 5),
    "qwen3": (transformers.Qwen3Config, 9),  # norms its queries and keys as well
}


def tiny(kind="llama", dtype=torch.float32):
    torch.manual_seed(0)
    config, _ = KINDS[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model


def loss_and_gradients(model):
    tokens = torch.arange(40).reshape(2, 20) % 50
    loss = model(input_ids=tokens, labels=tokens).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_untouched_model(kind):
    model = tiny(kind)
    accelerated = copy.deepcopy(model)
    report = accelerate(accelerated)
    assert report.replaced.pop("") == ("attention", "cpu")
    assert report.replaced.pop("lm_head") == ("linear_cross_entropy", "cpu")
    assert len(report.replaced) == KINDS[kind][1]
    assert set(report.replaced.values()) == {("rms_norm", "cpu")}
    loss, gradients = loss_and_gradients(model)
    our_loss, our_gradients = loss_and_gradients(accelerated)
    torch.testing.assert_close(our_loss, loss)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_kernels_really_run():
    model = tiny()
    accelerate(model)
    with torch.profiler.profile() as profile:
        loss_and_gradients(model)
    names = {event.key for event in profile.key_averages()}
    for op in ("rms_norm", "attention"):
        assert {f"gradsmith::{op}", f"gradsmith::{op}_backward"} <= names
    assert "gradsmith::linear_cross_entropy_with_gradients" in names


def test_undo_gives_the_model_back():
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    report = accelerate(model)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "gradsmith"
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_twice_is_harmless():
    model = tiny()
    accelerate(model)
    again = accelerate(model)
    assert again.replaced == {}
    assert set(again.left_alone.values()) == {"already accelerated"}
    assert "left alone, already accelerated" in str(again)
    again.undo()
    assert accelerate(model).replaced == {}


def test_a_copy_of_an_accelerated_model_is_accelerated_and_its_own():
    model = tiny()
    accelerate(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.norm.weight)
    tokens = torch.arange(10)[None]
    assert twin(input_ids=tokens).logits.abs().sum() == 0
    assert model(input_ids=tokens).logits.abs().sum() > 0


def test_frozen_norms_are_accelerated_as_well():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    twin = copy.deepcopy(model)
    assert len(accelerate(twin, only=["rms_norm"]).replaced) == 5
    for ours, theirs in zip(loss_and_gradients(twin)[1], loss_and_gradients(model)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_replaced_is_left_alone_and_named():
    class GemmaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))
            self.eps = 1e-6

    with torch.device("meta"):
        meta = tiny().model.norm
    quantised = tiny().model.norm
    quantised.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict({"other": GemmaRMSNorm(), "meta": meta, "quantised": quantised})
    report = accelerate(model)
    assert report.replaced == {}
    assert "GemmaRMSNorm is not a class" in report.left_alone["other"]
    assert "meta device" in report.left_alone["meta"]
    assert "torch.int8" in report.left_alone["quantised"]


def test_mixed_dtypes_keep_the_modules_own_result():
    norm = tiny().model.norm
    twin = copy.deepcopy(norm)
    accelerate(twin)
    x = torch.randn(3, 32).bfloat16()
    assert twin(x).dtype == norm(x).dtype == torch.float32
    assert torch.equal(twin(x), norm(x))


def test_only_and_without():
    model = tiny()
    assert (
        accelerate(model, without=["rms_norm", "attention", "linear_cross_entropy"]).replaced == {}
    )
    assert len(accelerate(model, only=["rms_norm"]).replaced) == 5
    assert model.config._attn_implementation == "sdpa"
    rest = {"": ("attention", "cpu"), "lm_head": ("linear_cross_entropy", "cpu")}
    assert accelerate(model, without=["rms_norm"]).replaced == rest
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        accelerate(model, only=["rmsnorm"])


def test_it_compiles():
    model = tiny()
    accelerate(model)
    loss, gradients = loss_and_gradients(model)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(model)
    torch.testing.assert_close(compiled_loss, loss)
    for one, other in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------- attention alone


def attention_of(model, **options):
    """What `accelerate` says of a model's attention: a backend, or why it is left alone."""
    report = accelerate(model, only=["attention"], **options)
    (found,) = {**report.replaced, **report.left_alone}.values()
    return found


def test_attention_that_is_left_alone():
    assert "flash_attention_2, which somebody chose" in attention_of(with_config(
        _attn_implementation="flash_attention_2"))  # fmt: skip
    assert "return its attention weights" in attention_of(with_config(
        _attn_implementation="eager", output_attentions=True))  # fmt: skip
    assert "torch.float64, beyond" in attention_of(tiny().double())
    assert "meta device" in attention_of(tiny().to("meta"))
    small = {"hidden_size": 32, "n_head": 4, "n_layer": 1, "vocab_size": 50}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**small))
    assert "does not go through transformers' AttentionInterface" in attention_of(bloom)
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=48, vocab_size=50
    )
    report = accelerate(transformers.T5ForConditionalGeneration(t5), only=["attention"])
    assert report.replaced == {}
    assert all("does not take flash attention" in why for why in report.left_alone.values())


def with_config(**values):
    model = tiny()
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def test_eager_attention_is_replaced_and_comes_back():
    model = with_config(_attn_implementation="eager")
    report = accelerate(model, only=["attention"])
    assert report.replaced == {"": ("attention", "cpu")}
    report.undo()
    assert model.config._attn_implementation == "eager"


def test_a_model_of_models_has_an_entry_for_each():
    text = tiny().config
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=49,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    report = accelerate(model, only=["attention"])
    assert set(report.replaced) == {"", "model.vision_tower", "model.language_model"}
    configs = (config, config.vision_config, config.text_config)
    assert [c._attn_implementation for c in configs] == ["gradsmith"] * 3
    inputs = {"input_ids": torch.tensor([[1, 49, 49, 49, 49, 2]]),
              "pixel_values": torch.randn(1, 3, 8, 8)}  # fmt: skip
    with torch.no_grad():
        ours = model(**inputs).logits
        report.undo()
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert [c._attn_implementation for c in configs] == ["sdpa"] * 3


def test_under_an_adapter():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    loss, gradients = loss_and_gradients(model)
    report = accelerate(model)
    assert report.replaced["base_model.model"] == ("attention", "cpu")
    our_loss, our_gradients = loss_and_gradients(model)
    torch.testing.assert_close(our_loss, loss)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_saved_model_loads_without_gradsmith(tmp_path):
    model = tiny()
    accelerate(model)
    model.save_pretrained(tmp_path)
    written = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert "gradsmith" not in written
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation
        == "sdpa"
    )
