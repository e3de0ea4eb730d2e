"""gradsmith's attention inside transformers models, against the same models untouched."""

import copy
import importlib
import re
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradsmith_kernels.transformers import attention as transformers_attention
from gradsmith_kernels.transformers.attention import Mask
from gradsmith_kernels.verify.testing import relative_error

transformers = pytest.importorskip("transformers")

masking = importlib.import_module("transformers.masking_utils")

S = 24
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# What is changed in the models of models.py.
DECODERS = {
    "llama": {},
    "qwen2": SLIDING,
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    "gemma3": LAYERS,
    "phi3": {"sliding_window": 6},
    "gpt2": {},
    "gpt_oss": LAYERS,
    "deepseek_v3": {},
}
ENCODERS = {
    "bert": {},
    "modernbert": {"num_hidden_layers": 2, "local_attention": 6, "global_attn_every_n_layers": 2},
}


def tiny(kind, dtype=torch.float64, **changes):
    model = models.tiny(kind, **(DECODERS | ENCODERS)[kind] | changes)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, 0, 0.3)  # attention must matter
    if kind == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one takes no float64
    return model if dtype == torch.float32 else model.to(dtype)


def with_ours(model):
    twin = copy.deepcopy(model)
    transformers_attention.register()
    twin.set_attn_implementation("gradsmith")
    return twin


def batch(case):
    """Three rows of tokens, and what says how they are masked."""
    torch.manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (3, S))
    inputs = {"input_ids": tokens, "labels": tokens.clone()}
    order = torch.arange(S)
    if case == "packed":
        lengths = [[7, 1, 11, 5], [24], [12, 12]]
        positions = [torch.cat([order[:length] for length in row]) for row in lengths]
        inputs |= {"position_ids": torch.stack(positions), "use_cache": False}
    elif case in ("left", "right"):
        kept = order >= torch.tensor([[0], [9], [S - 1]])
        if case == "right":
            kept = kept.flip(1)
        inputs |= {"attention_mask": kept.long()}
        inputs["labels"][~kept] = -100
        # Its prediction is made at the padding before it, whose output means nothing.
        inputs["labels"][torch.arange(3), kept.int().argmax(1)] = -100
    return inputs


def loss_and_gradients(model, inputs):
    loss = model(**inputs).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, [torch.zeros(()) if g is None else g for g in gradients]


def assert_same(model, ours, inputs):
    """Nothing but rounding is left: of float64, or of float32, in which eager attention's softmax
    is even in a float64 model."""
    bound = 2e-6 if model.config._attn_implementation == "eager" else 1e-10
    bound = 1e-4 if model.dtype == torch.float32 else bound
    loss, gradients = loss_and_gradients(model, inputs)
    our_loss, our_gradients = loss_and_gradients(ours, inputs)
    assert relative_error(our_loss, loss) <= bound
    whole = torch.stack([g.norm() for g in gradients]).norm()
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
        assert (mine - theirs).norm() <= bound * (theirs.norm() + 1e-3 * whole)


@pytest.fixture
def sparse(monkeypatch):
    """Fails where a mask of Sq x Sk is made or used."""

    def dense(*_, **__):
        raise AssertionError("a dense mask")

    monkeypatch.setattr(transformers_attention, "_dense", dense)


@pytest.mark.parametrize("case", ["plain", "packed", "left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_compute_what_they_did(kind, case, sparse):
    # Eager attention's mask is float64's lowest number, of which its softmax makes NaN.
    nan = kind in ("gemma2", "gpt_oss") and case in ("left", "right")
    model = tiny(kind, torch.float32 if nan else torch.float64)
    assert_same(model, with_ours(model), batch(case))


@pytest.mark.parametrize("case", ["plain", "left", "right"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_compute_what_they_did(kind, case, sparse):
    model = tiny(kind)
    assert_same(model, with_ours(model), batch(case))


def test_a_vision_model_computes_what_it_did(sparse):
    torch.manual_seed(0)
    model = models.tiny("vit", image_size=12, attention_probs_dropout_prob=0.0).double()
    inputs = {"pixel_values": torch.randn(2, 3, 12, 12).double(), "labels": torch.tensor([0, 1])}
    assert_same(model, with_ours(model), inputs)


def test_cross_attention_computes_what_it_did(sparse):
    """Its padding is of the keys alone, also where there are as many queries as keys."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": VOCABULARY, "decoder_start_token_id": 1}
    sizes |= {f"{half}_{what}": n for half in ("encoder", "decoder")
              for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, dropout=0.0, max_position_embeddings=64)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    model = model.double().train()
    ours = with_ours(model)
    for case in ("plain", "left", "right"):
        inputs = batch(case)
        assert_same(model, ours, inputs)
        assert_same(model, ours, inputs | {"labels": torch.randint(1, VOCABULARY, (3, 9))})


def test_nothing_of_the_size_of_a_mask_is_allocated():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.bytes = max(self.bytes, x.untyped_storage().nbytes())
            return out

    S = 640
    tokens = torch.randint(1, VOCABULARY, (2, S))
    packed = {"position_ids": torch.arange(S).remainder(100).expand(2, -1), "use_cache": False}
    padded = {"attention_mask": (torch.arange(S) > torch.tensor([[3], [500]])).long()}
    for kind in ("mistral", "gemma2"):
        model = tiny(kind, torch.float32).base_model
        ours = with_ours(model)
        for more in ({}, packed, padded):
            for m in (model, ours):
                with Largest() as largest:
                    m(input_ids=tokens, **more).last_hidden_state.sum().backward()
                # transformers' own makes one: the test can see it
                assert (largest.bytes >= S * S) == (m is model)


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "gpt_oss"])
def test_documents_of_a_row_do_not_leak(kind):
    """Another first document changes no bit of the others.

    gpt_oss of transformers 5.23 does not hand the positions to its masks; see the next test.
    """
    ours = with_ours(tiny(kind, torch.float32)).eval()
    inputs = batch("packed")
    del inputs["labels"]
    with torch.no_grad():
        one = ours(**inputs).logits
        inputs["input_ids"][0, :7] = torch.arange(7) + 20
        other = ours(**inputs).logits
    assert torch.equal(one[0, 7:], other[0, 7:])
    assert torch.equal(one[1:], other[1:])
    assert not torch.equal(one[0, :7], other[0, :7])


@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss"])
def test_flash_attentions_own_arguments_separate_documents(kind):
    """cu_seq_lens_q and so on, as transformers' DataCollatorWithFlattening gives them."""
    ours = with_ours(tiny(kind))
    inputs = batch("packed")
    row = {name: inputs[name][:1] for name in ("input_ids", "labels", "position_ids")}
    parts = [slice(0, 7), slice(7, 8), slice(8, 19), slice(19, 24)]
    ends = torch.tensor([0, 7, 8, 19, 24], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    with torch.no_grad():
        alone = [ours(row["input_ids"][:, part]).logits for part in parts]
        found = ours(**row | lengths).logits  # with a cache, which hides the positions
        torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-8, atol=1e-10)
        assert relative_error(ours(**row).logits, found) > 1e-3
        # Several rows: the ends count through all of them.
        rows = {name: row[name].expand(2, -1) for name in ("input_ids", "position_ids")}
        both = torch.cat([ends, ends[1:] + S])
        found = ours(**rows, **lengths | {"cu_seq_lens_q": both, "cu_seq_lens_k": both}).logits
        expected = torch.cat(alone, 1).expand(2, -1, -1)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_gives_the_same_tokens(kind):
    model = tiny(kind).eval()
    ours = with_ours(model)
    for case in ("plain", "left"):
        inputs = batch(case)
        del inputs["labels"]
        if case == "left" and kind in ("gemma2", "gpt_oss"):  # NaN, see above
            model, ours = model.float(), ours.float()
        options = {
            "max_new_tokens": 10,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
    if model._supports_sdpa:
        options |= {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["packed", "left"])
def test_gradient_checkpointing(case, reentrant):
    ours = with_ours(tiny("gemma3"))
    expected = loss_and_gradients(ours, batch(case))
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    found = ours(**batch(case)).loss
    found.backward()
    assert torch.equal(found, expected[0])
    for parameter, gradient in zip(ours.parameters(), expected[1], strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_dropout_is_replayed_by_gradient_checkpointing():
    ours = with_ours(tiny("llama", attention_dropout=0.4))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        ours.zero_grad()
        loss = ours(**batch("packed")).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ours.eval()
    assert ours(**batch("packed")).loss != results[0][0]


def test_compiled():
    """Also where the documents of the next batch are others, in number and in length."""
    ours = with_ours(tiny("gemma3"))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    inputs = batch("packed")
    for _ in range(2):
        found, expected = (loss_and_gradients(m, inputs) for m in (compiled, ours))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        inputs["position_ids"] = torch.arange(S).remainder(9).expand(3, -1)


# ------------------------------------------------------------------------------------- the masks


@st.composite
def requests(draw):
    """What transformers asks a mask function for: rows, lengths, a cache, padding, a rule."""
    rows, q_length, window = draw(st.integers(1, 3)), draw(st.integers(1, 9)), None
    past = draw(st.integers(0, 5))
    asked = {"batch_size": rows, "q_length": q_length, "kv_length": q_length + past}
    rule = draw(st.sampled_from(["causal", "window", "all", "window to both sides", "chunks"]))
    if "window" in rule:
        window = draw(st.integers(1, 12))
    functions = {
        "causal": lambda: masking.causal_mask_function,
        "window": lambda: masking.sliding_window_causal_mask_function(window),
        "all": lambda: masking.bidirectional_mask_function,
        "window to both sides": lambda: masking.sliding_window_bidirectional_mask_function(window),
        "chunks": lambda: masking.chunked_causal_mask_function(3, torch.zeros(rows, dtype=int)),
    }
    asked["mask_function"] = functions[rule]()
    if rule not in ("all", "window to both sides"):
        asked["q_offset"] = past
    if rule == "window" and draw(st.booleans()):  # a cache that keeps what the window reaches
        asked["kv_offset"] = max(0, past - window + 1)
        asked["kv_length"] -= asked["kv_offset"]
    padded = draw(st.sampled_from(["not", "left", "right", "both", "amid", "static cache"]))
    positions = asked["kv_length"] + asked.get("kv_offset", 0)
    if padded == "static cache":
        asked["kv_length"] += 2
    if padded in ("left", "right", "both", "static cache"):
        places = st.lists(st.integers(0, positions), min_size=rows, max_size=rows)
        a, b = torch.tensor(draw(places)), torch.tensor(draw(places))
        begin = torch.minimum(a, b) if padded in ("left", "both") else torch.zeros(rows)
        end = torch.maximum(a, b) if padded in ("right", "both") else torch.full((rows,), positions)
        order = torch.arange(positions)
        asked["attention_mask"] = (order >= begin[:, None]) & (order < end[:, None])
    elif padded == "amid":
        values = draw(st.lists(st.booleans(), min_size=rows * positions, max_size=rows * positions))
        asked["attention_mask"] = torch.tensor(values).view(rows, positions)
    elif past == 0 and rule in ("causal", "window") and draw(st.booleans()):
        cuts = draw(st.lists(st.booleans(), min_size=rows * q_length, max_size=rows * q_length))
        numbers = torch.tensor(cuts).view(rows, q_length).cumsum(1)
        order = torch.arange(q_length).expand(rows, -1)
        starts = torch.where(numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0, order, 0)
        asked["mask_function"] = masking.packed_sequence_compatibility_function(
            asked["mask_function"], order - starts.cummax(1).values, numbers
        )
    if draw(st.booleans()):  # image tokens that see each other
        blocks = torch.randint(-1, 2, (rows, asked["kv_length"] + asked.get("kv_offset", 0) + 9))
        overlay = masking.blockwise_overlay(blocks)
        both = draw(st.sampled_from([masking.or_masks, masking.and_masks]))
        asked["mask_function"] = both(asked["mask_function"], overlay)
    return asked


@settings(deadline=None, max_examples=400)
@given(requests())
def test_every_mask_says_what_transformers_dense_one_says(asked):
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = masking.sdpa_mask(**asked | skips)
    found = transformers_attention.mask(**asked | {"allow_is_bidirectional_skip": True})
    sizes = asked["batch_size"], asked["q_length"], asked["kv_length"]
    if found is None:  # causal, or all: the layer knows; one query sees all in both
        causal = asked["q_length"] > 1 and not expected[0, 0, 0, 1:].any()
        found = Mask(right=0 if causal else -1)
    if isinstance(found, Mask):
        found = found.dense(*sizes, torch.device("cpu"))
        if "attention_mask" in asked and asked["q_length"] <= asked["attention_mask"].shape[1]:
            # Of a query that is padding nothing is computed, and it sees nothing.
            text = asked["attention_mask"][:, -asked["q_length"] :, None][:, None]
            assert not (found & ~expected).any()
            found, expected = found & text, expected & text
    assert torch.equal(found.expand(expected.shape), expected)


def test_a_rule_of_somebody_elses_is_dense():
    def even(b, h, i, j):
        return j % 2 == 0

    asked = {"batch_size": 1, "q_length": 6, "kv_length": 6}
    for function in (even, masking.and_masks(even, masking.causal_mask_function)):
        found = transformers_attention.mask(**asked, mask_function=function)
        expected = masking.sdpa_mask(**asked, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(found, expected)


def test_a_mask_that_the_model_computes_with_is_dense():
    found = transformers_attention.mask(1, 6, 6, allow_is_causal_skip=False)
    assert torch.equal(found[0, 0], torch.ones(6, 6, dtype=torch.bool).tril())


# ------------------------------------------------------------------------------------- one layer


def layer(**sizes):
    """A stand-in for a layer, and its queries, keys and values."""
    torch.manual_seed(0)
    sizes = {"q": 6, "k": 6, "heads": 4, "key_heads": 2, "size": 8, "values": 8, **sizes}
    q = torch.randn(2, sizes["heads"], sizes["q"], sizes["size"], dtype=torch.float64)
    k = torch.randn(2, sizes["key_heads"], sizes["k"], sizes["size"], dtype=torch.float64)
    v = torch.randn(2, sizes["key_heads"], sizes["k"], sizes["values"], dtype=torch.float64)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, sizes["heads"] // sizes["key_heads"]
    return module, q, k, v


def sdpa(*args, **kwargs):
    return transformers.AttentionInterface()["sdpa"](*args, **kwargs)[0]


def ours(*args, **kwargs):
    out, weights = transformers_attention.attend(*args, **kwargs)
    assert weights is None
    return out


def test_tensors_as_masks_and_biases():
    inputs = layer()
    seen = torch.rand(2, 1, 6, 6) < 0.7
    seen[..., 0] = True
    added = torch.zeros(seen.shape).double().masked_fill(~seen, -1e300)
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    for mask in (None, seen, added):
        for more in ({}, {"position_bias": bias}, {"scaling": 0.7}):
            close(ours(*inputs, mask, **more), sdpa(*inputs, mask, **more))
    window = Mask(left=2, right=0)
    dense = window.dense(2, 6, 6, torch.device("cpu"))
    found = ours(*inputs, window, position_bias=bias)
    close(found, sdpa(*inputs, dense, position_bias=bias))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_softcap_and_sink_are_the_same_with_a_tensor_as_mask():
    window = Mask(3, 0, *[torch.tensor([0, 6, 8, 12], dtype=torch.int32)] * 2, 6, 6)
    inputs = layer()
    dense = window.dense(2, 6, 6, torch.device("cpu"))
    added = torch.where(dense, 0.0, -1e30).double()
    sink = torch.randn(4, dtype=torch.float64)
    for more in ({"softcap": 2.0}, {"s_aux": sink}, {"softcap": 2.0, "s_aux": sink}):
        close(ours(*inputs, dense, **more), ours(*inputs, window, **more))
        close(ours(*inputs, added, **more), ours(*inputs, window, **more))


def test_a_query_without_keys_gives_0_and_gradients_that_are_numbers():
    for more in ({}, {"softcap": 2.0}):
        module, *tensors = layer()
        seen = torch.ones(6, 6, dtype=torch.bool).tril(-1).expand(2, 1, 6, 6)
        tensors = [x.requires_grad_() for x in tensors]
        out = ours(module, *tensors, seen, **more)
        assert (out[:, 0] == 0).all()
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in tensors)


def test_head_sizes():
    for sizes in ({"size": 264, "values": 264}, {"values": 6}, {"size": 6, "values": 9}):
        inputs = layer(**sizes)
        close(ours(*inputs, None), sdpa(*inputs, None))
        window = Mask(left=2, right=0)
        close(ours(*inputs, window), sdpa(*inputs, window.dense(2, 6, 6, torch.device("cpu"))))


def test_the_beginning_of_a_static_cache():
    inputs = layer(q=3, k=9)
    close(ours(*inputs, None), sdpa(*inputs, None))


def test_one_row_of_queries_for_all():
    module, q, k, v = layer()
    found = ours(module, q[:1], k, v, None, is_causal=False)
    close(found, sdpa(module, q[:1], k, v, None, is_causal=False))


def test_autocast_computes_in_its_dtype():
    module, q, k, v = layer()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(module, q.float(), k.float(), v.bfloat16(), None)
        expected = sdpa(module, q.float(), k.float(), v.bfloat16(), None)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_what_it_cannot_do_is_refused():
    inputs = layer()
    with pytest.raises(ValueError, match="passes indices to attention"):
        ours(*inputs, None, indices=torch.zeros(1))
    with pytest.raises(TypeError, match="attention_mask is a str"):
        ours(*inputs, "mask")


def test_fake_tensors():
    """Not with a whole model: built in this mode, it was seen to corrupt the heap (torch warns that
    the data pointers of fake tensors are read), whatever computed its attention."""
    module = layer()[0]
    causal, packed = masking.causal_mask_function, masking.packed_sequence_mask_function
    with FakeTensorMode():
        q, k, v = (torch.empty(3, 4, S, 8) for _ in range(3))
        documents = torch.empty(3, S, dtype=torch.int64)
        for asked in (
            {},
            {"mask_function": masking.and_masks(causal, packed(documents))},
            {"attention_mask": torch.empty(3, S, dtype=torch.bool)},
        ):
            found = transformers_attention.mask(3, S, S, **asked)
            assert ours(module, q, k, v, found).shape == (3, S, 4, 8)


def test_an_older_mask_interface_is_refused(monkeypatch):
    monkeypatch.setattr(masking, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(RuntimeError, match="asks for masks in another way"):
        transformers_attention.register()


def test_the_python_in_the_docs_runs(capsys):
    text = (Path(__file__).parents[3] / "docs" / "attention.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/attention.md", "exec"), names)
    assert capsys.readouterr().out.startswith("model: attention (cpu)\n")
    assert names["out"].shape == (512, 8, 64)
    assert names["logits"].shape == (2, 256, 128)
