import copy
import functools
import pickle
from collections import Counter

import pytest
import torch
from models import tiny
from torch import nn

from gradsmith_kernels import accelerate
from gradsmith_kernels.ops.linear import op as linear_op
from gradsmith_kernels.transformers import exchange, rotary

transformers = pytest.importorskip("transformers")

EVERY_OP = ["attention", "glu", "layer_norm", "linear", "rms_norm", "rope"]
EVERY_OP += ["linear_cross_entropy"]


def loss_and_gradients(model):
    tokens = torch.arange(40).reshape(2, 20) % 50
    loss = model(input_ids=tokens, labels=tokens).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, parameters)


def assert_same_training(ours, theirs):
    """That two models have one loss and one gradient, to rounding."""
    (our_loss, our_gradients), (loss, gradients) = map(loss_and_gradients, (ours, theirs))
    torch.testing.assert_close(our_loss, loss)
    for one, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def ops_in(report):
    return Counter(op for op, _ in report.replaced.values())


def test_the_kernels_really_run():
    model = tiny()
    accelerate(model)
    with torch.profiler.profile() as profile:
        loss_and_gradients(model)
    names = {event.key for event in profile.key_averages()}
    for op in ("attention", "glu", "rms_norm"):
        assert {f"gradsmith::{op}", f"gradsmith::{op}_backward"} <= names
    assert "gradsmith::rope" in names
    assert "gradsmith::linear_cross_entropy_with_gradients" in names


def test_undo_gives_the_model_back():
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    report = accelerate(model)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "gradsmith"
    after = {name: type(module) for name, module in model.named_modules()}
    changed = [name for name in before if after[name] is not before[name]]
    assert len(changed) == len(report.replaced)  # the head for the loss, the model for both of its
    for name in changed:
        assert issubclass(after[name], before[name])
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_several_reports_are_undone_in_any_order(order):
    model = tiny()
    before = {name: type(module) for name, module in model.named_modules()}
    reports = [accelerate(model, only=["rms_norm", "glu"]), accelerate(model, only=["attention"])]
    reports.append(accelerate(model))
    assert ops_in(reports[2]) == {"rope": 2, "linear_cross_entropy": 1}
    for index in order:
        reports[index].undo()
        reports[index].undo()  # has nothing left to do
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_undo_goes_from_the_last_to_the_first_and_stops_where_it_cannot():
    model = tiny()
    report = accelerate(model, only=["rms_norm"])
    norms = [module for name, module in model.named_modules() if name in report.replaced]
    ours, later = type(norms[1]), type("Later", (type(norms[1]),), {})
    norms[1].__class__ = later
    with pytest.raises(RuntimeError, match="has since been given the class Later"):
        report.undo()
    plain = transformers.models.llama.modeling_llama.LlamaRMSNorm
    assert [type(norm) for norm in norms] == [ours, later, plain, plain, plain]
    norms[1].__class__ = ours
    report.undo()
    assert {type(norm) for norm in norms} == {plain}


def test_twice_is_harmless():
    model = tiny()
    accelerate(model)
    again = accelerate(model)
    assert again.replaced == {}
    assert set(again.left_alone.values()) == {"already accelerated"}
    assert "left alone, already accelerated" in str(again)
    assert len(again.left_alone) == 11
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


def test_a_pickled_model_is_accelerated_still():
    model = tiny()
    accelerate(model, without=["attention"])
    twin = pickle.loads(pickle.dumps(model))
    types = [type(module) for module in model.modules()]
    assert [type(module) for module in twin.modules()] == types
    assert torch.equal(loss_and_gradients(twin)[0], loss_and_gradients(model)[0])


def test_frozen_weights_are_accelerated_as_well():
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name and "gate" not in name and "q_proj" not in name)
    twin = copy.deepcopy(model)
    assert ops_in(accelerate(twin))["rms_norm"] == 5
    assert_same_training(twin, model)


def test_gradient_checkpointing():
    model = tiny()
    twin = copy.deepcopy(model)
    accelerate(twin)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_training(twin, model)


def test_hooks_run_as_before():
    def watched(model):
        seen = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
        model(input_ids=torch.arange(10)[None])
        return seen

    model = tiny()
    twin = copy.deepcopy(model)
    accelerate(twin)
    assert watched(twin) == watched(model)  # those on the MLP's activation among them


def test_children_compute_with_their_own_weights():
    """As under ZeRO-3, which has each module's own weights while that module runs and no longer."""
    model = tiny().eval()
    twin = copy.deepcopy(model)
    accelerate(twin)
    for module in twin.modules():
        own = dict(module.named_parameters(recurse=False))
        kept = {name: parameter.data for name, parameter in own.items()}

        def gather(_, arguments, own=own, kept=kept):
            for name, parameter in own.items():
                parameter.data = kept[name]

        def let_go(_, arguments, output, own=own):
            for parameter in own.values():
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(let_go)
        let_go(None, None, None)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (m(input_ids=tokens).logits for m in (twin, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def why(model, op, name):
    """Why `op` leaves the module of this name alone."""
    report = accelerate(model, only=[op])
    assert name not in report.replaced
    return report.left_alone[name]


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

    first = "model.layers.0"
    for op, name in (("glu", f"{first}.mlp"), ("rope", f"{first}.self_attn")):
        assert "meta device" in why(tiny().to("meta"), op, name)
        assert "torch.float64 (quantised, or beyond" in why(tiny().double(), op, name)
    assert "its activation is ReLU" in why(tiny(hidden_act="relu"), "glu", f"{first}.mlp")
    other = tiny()
    other.model.layers[0].mlp.act_fn = type("SiLU", (nn.Tanh,), {})()  # by its name alone
    assert "its activation is SiLU" in why(other, "glu", f"{first}.mlp")
    without_positions = tiny("smollm3", no_rope_layers=[0, 1])
    assert "without rotary positions" in why(without_positions, "rope", f"{first}.self_attn")
    norms = nn.ModuleList([nn.LayerNorm((2, 3)), nn.LayerNorm(3, eps=0.0)])
    assert "over 2 dimensions" in why(norms, "layer_norm", "0")
    assert "epsilon is 0" in why(norms, "layer_norm", "1")
    assert "epsilon is 0" in why(tiny(rms_norm_eps=0.0), "rms_norm", "model.norm")
    hooked = tiny()  # as device maps of the accelerate package do it
    hooked.model.layers[0].mlp.forward = hooked.model.layers[0].mlp.forward
    assert "a forward of its own" in why(hooked, "glu", f"{first}.mlp")


def test_a_rotation_that_somebody_has_exchanged_is_left_alone(monkeypatch):
    module = transformers.models.llama.modeling_llama
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert "has exchanged its apply_rotary" in why(tiny(), "rope", "model.layers.0.self_attn")


def test_a_family_that_is_not_known_is_left_alone_and_named():
    report = accelerate(tiny("granite"))
    assert ops_in(report) == {"attention": 1}
    reasons = Counter(report.left_alone.values())
    for cls, count in (("RMSNorm", 5), ("MLP", 2), ("Attention", 2)):
        assert reasons[f"Granite{cls} is not a class whose formula is known"] == count
    assert "GraniteForCausalLM is not a class" in report.left_alone["lm_head"]


def test_a_model_of_which_nothing_is_known_is_named():
    report = accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert report.left_alone == {"": "nothing in a Sequential is known to these ops"}
    assert str(report) == "model: left alone, nothing in a Sequential is known to these ops"


def test_the_modules_of_transformers_stay_as_they_are():
    module = transformers.models.llama.modeling_llama
    before = dict(vars(module))
    model = tiny()
    accelerate(model)
    loss_and_gradients(model)
    assert vars(module) == before


def test_mixed_dtypes_keep_the_modules_own_result():
    norm = tiny().model.norm
    twin = copy.deepcopy(norm)
    accelerate(twin)
    x = torch.randn(3, 32).bfloat16()
    assert twin(x).dtype == norm(x).dtype == torch.float32
    assert torch.equal(twin(x), norm(x))

    norm = nn.LayerNorm(32)
    twin = copy.deepcopy(norm)
    accelerate(twin)
    assert twin(x).dtype == norm(x).dtype == torch.bfloat16  # torch allows this pair of dtypes
    with pytest.raises(RuntimeError, match="mixed dtype"):  # and not the other
        twin.bfloat16()(x.float())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_under_autocast_every_module_has_its_own_dtype(kind):
    def run(model):
        dtypes = {}
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _, __, output, name=name: dtypes.update(
                    {name: getattr(output, "dtype", output)}
                )
            )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(20)[None]).logits
        return logits, {n: d for n, d in dtypes.items() if isinstance(d, torch.dtype)}

    model = tiny(kind)
    twin = copy.deepcopy(model)
    accelerate(twin)
    (ours, our_dtypes), (theirs, dtypes) = run(twin), run(model)
    assert our_dtypes == dtypes
    assert len(dtypes) > 15
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def rotation_of(forward):
    """The rotation that an attention's forward calls, decorated or not."""
    name = rotary.ROTARY
    while name not in forward.__globals__:
        forward = next(c.cell_contents for c in forward.__closure__ if callable(c.cell_contents))
    return forward.__globals__[name]


def test_a_decorated_attention_keeps_its_decorator(monkeypatch):
    """transformers 5.24 has one that takes an argument by its old name, too."""
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    inner = attention.forward

    @functools.wraps(inner)
    def counting(*args, **kwargs):
        calls.append(args[0])
        return inner(*args, **kwargs)

    calls = []
    monkeypatch.setattr(attention, "forward", counting)
    monkeypatch.setattr(exchange, "_made", {})
    model = tiny()
    twin = copy.deepcopy(model)
    assert ops_in(accelerate(model, only=["rope"])) == {"rope": 2}
    assert_same_training(model, twin)
    assert len(calls) == 4
    with torch.profiler.profile() as profile:
        model(input_ids=torch.arange(6)[None])
    assert "gradsmith::rope" in {event.key for event in profile.key_averages()}


def test_shapes_of_another_rotation_go_to_the_models_own():
    model = tiny()
    accelerate(model, only=["rope"])
    forward = type(model.model.layers[0].self_attn).forward
    ours, original = rotation_of(forward), rotation_of(forward.__wrapped__)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    cos, sin = torch.randn(2, 2, 6, 8)
    theta = torch.randn(6, 8, requires_grad=True)
    cases = [
        ((q, k, cos, sin), {}, True),
        ((q, k, cos[:1], sin[:1]), {}, True),
        ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}, False),
        ((q, k, cos[0], sin[0]), {"unsqueeze_dim": 0}, False),
        ((q, k, cos[:, :1], sin[:, :1]), {}, False),  # one angle for all positions
        ((q, k, theta.cos()[None], theta.sin()[None]), {}, False),  # angles that are learnt
    ]
    for arguments, options, kernel in cases:
        with torch.profiler.profile() as profile:
            found = ours(*arguments, **options)
        assert ("gradsmith::rope" in {event.key for event in profile.key_averages()}) == kernel
        for one, other in zip(found, original(*arguments, **options), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_only_and_without():
    model = tiny()
    assert accelerate(model, without=EVERY_OP).replaced == {}
    for op, count in (("rms_norm", 5), ("glu", 2), ("rope", 2)):
        report = accelerate(model, only=[op])
        assert ops_in(report) == {op: count}
        report.undo()
    accelerate(model, only=["rms_norm"])
    assert model.config._attn_implementation == "sdpa"
    rest = accelerate(model, without=["rms_norm", "glu"])
    assert ops_in(rest) == {"attention": 1, "rope": 2, "linear_cross_entropy": 1}
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        accelerate(model, only=["rmsnorm"])
    with pytest.raises(ValueError, match=r"without names 'layernorm'.*did you mean 'layer_norm'"):
        accelerate(model, without=["layernorm"])


def test_it_compiles_whole_and_once():
    model = tiny()
    twin = copy.deepcopy(model)
    accelerate(twin, without=["attention"])  # whose mask is made outside of the graph
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    twin = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            assert_same_training(twin, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    names = {event.key for event in profile.key_averages()}
    assert {"gradsmith::glu", "gradsmith::rms_norm", "gradsmith::rope"} <= names


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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eager_attention_gives_its_weights_to_a_call_that_asks_for_them(kind):
    model = tiny(kind, attn_implementation="eager").eval()
    tokens = torch.arange(20).reshape(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    asked = {"input_ids": tokens, "attention_mask": mask, "output_attentions": True}

    def weights(model):
        return [*model(**asked).attentions, *model.base_model(**asked).attentions]

    # Of a twin: the hooks by which transformers captures weights, once there, cannot be pickled.
    expected = weights(copy.deepcopy(model))
    assert expected[0].shape[:1] + expected[0].shape[2:] == (2, 10, 10)
    report = accelerate(model)
    assert {"attention", "linear_cross_entropy"} <= ops_in(report).keys()
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        for one, other in zip(weights(twin), expected, strict=True):
            torch.testing.assert_close(one, other)
        assert twin.config._attn_implementation == "gradsmith"
        assert not twin(input_ids=tokens).attentions
    before = type(model)
    report.undo()
    assert type(model) is not before
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


@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_with_an_adapter(first):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")

    def adapted(model):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0, 0.1)
        return model

    ours = tiny()
    if first == "accelerate":
        report = accelerate(ours)
    model = adapted(ours)
    if first == "adapter":
        report = accelerate(model)
        assert report.replaced["base_model.model"] == ("attention", "cpu")
    expected = {"attention": 1, "glu": 2, "linear_cross_entropy": 1, "rms_norm": 5, "rope": 2}
    assert ops_in(report) == expected
    assert_same_training(model, adapted(tiny()))
    report.undo()
    assert_same_training(model, adapted(tiny()))


def test_quantised_layers_within_are_no_obstacle():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny(dtype=torch.bfloat16).eval()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            quantised = bitsandbytes.nn.Linear4bit(32, 48, False, torch.bfloat16)
            quantised.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False)
            setattr(layer.mlp, name, quantised.to("cpu"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        report = accelerate(model)
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        assert ops_in(report)["glu"] == 2
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0.05, atol=0.02)


def test_tied_weights_stay_tied():
    model = tiny(tie_word_embeddings=True)
    twin = copy.deepcopy(model)
    report = accelerate(twin)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert_same_training(twin, model)
    report.undo()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


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


def test_linear_layers_where_the_weights_gradient_is_ours(monkeypatch):
    """As on AMX: every linear layer but the head, which is the loss's, and with the same result."""
    monkeypatch.setattr(linear_op, "dweight_backend", lambda device, dtype: "cpu")
    ours = tiny(dtype=torch.bfloat16)
    theirs = copy.deepcopy(ours)
    report = accelerate(ours, only=["linear", "linear_cross_entropy"])
    assert ops_in(report) == {"linear": 2 * 7, "linear_cross_entropy": 1}
    accelerate(theirs, only=["linear_cross_entropy"])
    tokens = torch.arange(160).reshape(4, 40) % 50  # rows enough for our products
    with torch.profiler.profile() as profile:
        loss = ours(input_ids=tokens, labels=tokens).loss
        loss.backward()
    assert "gradsmith::linear_backward" in {event.key for event in profile.key_averages()}
    other = theirs(input_ids=tokens, labels=tokens).loss
    other.backward()
    assert torch.equal(loss, other)  # the forward products are torch's
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad - two.grad).norm() <= 0.01 * two.grad.norm()


def test_linear_layers_stay_where_torchs_products_are_as_fast(monkeypatch):
    monkeypatch.setattr(linear_op, "dweight_backend", lambda device, dtype: "reference")
    report = accelerate(tiny(dtype=torch.bfloat16), only=["linear"])
    assert report.replaced == {}
    assert list(report.left_alone) == [""]
