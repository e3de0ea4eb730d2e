"""Attention under transformers models, by transformers' own door.

After `register()` a model can be loaded with, or be set to, `attn_implementation="gradsmith"`.
transformers then calls two functions. `mask` runs once in a forward for each kind of layer, is told
by which rule the model masks, and makes what the layers get as `attention_mask`:

- None: causal or not, as the layer itself says (transformers' convention);
- a `Mask`: a window, and where packed or padded sequences begin and end;
- a bool tensor (B, 1, Sq, Sk) for what a `Mask` cannot say: chunks, image tokens that see each
  other, prefixes, a static cache, padding amid a row. PyTorch's own attention computes these.

`attend` computes a layer. transformers itself is imported by `register` and what it leads to only.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gradsmith_kernels.ops.attention import attention, attention_varlen
from gradsmith_kernels.ops.attention.op import MAX_HEAD_SIZE

__all__ = ["NAME", "Mask", "register"]

NAME = "gradsmith"


class Mask(NamedTuple):
    """Which keys each query sees, in much less than Sq x Sk numbers.

    left, right: the window, as `attention` has it.
    cu_seqlens_q, cu_seqlens_k: where sequences begin and end in the batch's rows laid one behind
        the other, as `attention_varlen` has it; None where each row is one sequence.
    max_seqlen_q, max_seqlen_k: the longest of them, or more.
    """

    left: int = -1
    right: int = -1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def ndim(self) -> int:
        """As of the tensor in whose place it is: generation asks where it makes masks ahead."""
        return 4

    def contiguous(self) -> Mask:
        """Itself; generation asks for this too."""
        return self

    def dense(self, rows: int, q_length: int, kv_length: int, device: torch.device) -> Tensor:
        """The same as a bool tensor (rows, 1, q_length, kv_length)."""
        q, k = (torch.arange(rows * n, device=device) for n in (q_length, kv_length))
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            ends_q, ends_k = (
                torch.arange(rows + 1, device=device) * n for n in (q_length, kv_length)
            )
        else:
            ends_q, ends_k = self.cu_seqlens_q, self.cu_seqlens_k
        of_q = torch.searchsorted(ends_q[1:], q, right=True, out_int32=True)
        of_k = torch.searchsorted(ends_k[1:], k, right=True, out_int32=True)
        last = len(ends_q) - 1  # a row behind the last sequence: of_q is `last`, and sees nothing
        from_end_q = q - F.pad(ends_q[1:], (0, 1))[of_q]
        from_end_k = k - F.pad(ends_k[1:], (0, 1))[of_k]
        distance = from_end_k.view(rows, 1, -1) - from_end_q.view(rows, -1, 1)
        seen = of_q.view(rows, -1, 1) == of_k.view(rows, 1, -1)
        seen = seen & (of_q < last).view(rows, -1, 1)
        if self.left >= 0:
            seen = seen & (distance >= -self.left)
        if self.right >= 0:
            seen = seen & (distance <= self.right)
        return seen[:, None]


def register() -> None:
    """Makes attn_implementation="gradsmith" known to transformers. Doing it again is harmless.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: its mask interface is not the one that this was written for.
    """
    transformers = importlib.import_module("transformers")
    known = inspect.signature(_masking().sdpa_mask).parameters
    if "q_length" not in known or "q_offset" not in known:
        raise RuntimeError(
            f"transformers {transformers.__version__} asks for masks in another way than what "
            "gradsmith's attention was written for; a newer one does"
        )
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, mask)


@functools.cache
def _masking() -> Any:
    return importlib.import_module("transformers.masking_utils")


def with_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model whose attention was eager: a call that asks for the attention's
    weights, which the kernels do not keep, gets them from there."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, wanted = self.config, kwargs.get("output_attentions")
        if wanted is None:
            wanted = config.output_attentions
        if not wanted or config._attn_implementation != NAME:
            return original(self, *args, **kwargs)
        config._attn_implementation = {"": "eager"}
        try:
            return original(self, *args, **kwargs)
        finally:
            config._attn_implementation = {"": NAME}

    return forward


# ------------------------------------------------------------------------------------- the mask


# Not traced by torch.compile: its tracer has no closures, in which the rule is written.
@torch.compiler.disable
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Mask | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Mask | Tensor | None:
    """What the layers get as `attention_mask`; see the top of this file.

    Args:
        q_offset, kv_offset: what position the first query and the first key have.
        mask_function: the rule, f(b, h, i, j) -> whether query i sees key j; causal if None.
        attention_mask: (B, positions), False or 0 for padding; a `Mask`, made ahead, is returned.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may come back.
        others: for other implementations.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    function = mask_function or _masking().causal_mask_function
    found = None
    if attention_mask is None or attention_mask.dim() == 2:
        rule = _read(function)
        # Both False: the model goes on to compute with the mask, which must then be a tensor.
        wanted = allow_is_causal_skip or allow_is_bidirectional_skip
        if rule is not None and (wanted or rule.documents is not None):
            at_end = isinstance(q_offset, int) and q_length + q_offset == kv_length + kv_offset
            padding = _padding(attention_mask, kv_offset, kv_length)
            found = _express(rule, batch_size, q_length, kv_length, at_end, padding)
    if found is None:
        dense: Tensor = _masking().sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **others,
        )
        return dense
    plain = found.left < 0 and found.cu_seqlens_q is None
    if plain and (found.right < 0 or (found.right == 0 and q_length in (1, kv_length))):
        return None
    return found


class _Rule(NamedTuple):
    """A mask function, read: the window, and for packed rows a number for each token's document."""

    left: int = -1
    right: int = -1
    documents: Tensor | None = None


def _read(function: Callable[..., Any]) -> _Rule | None:
    """What one of transformers' mask functions says; None for all that are not known exactly."""
    masking = _masking()
    if function is masking.causal_mask_function:
        return _Rule(right=0)
    if function is masking.bidirectional_mask_function:
        return _Rule()
    maker, said = _made_by(function)
    if maker == "sliding_window_overlay" and said["sliding_window"] > 0:
        return _Rule(left=said["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay" and said["sliding_window"] > 0:
        return _Rule(said["sliding_window"], said["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return _Rule(documents=said["packed_sequence_mask"])
    if maker == "and_masks":
        return _both(said["mask_functions"])
    return None


def _both(functions: Sequence[Callable[..., Any]]) -> _Rule | None:
    """The rule that holds where all of these do."""
    rules, remapped = [], False
    for function in functions:
        maker, said = _made_by(function)
        if maker == "remap_positions_for_packed_sequence":
            # Asked with positions for indices. Within a document both have the same distances.
            function, remapped = said["mask_function"], True
        rules.append(_read(function))
    known = [rule for rule in rules if rule is not None]
    documents = [rule.documents for rule in known if rule.documents is not None]
    if len(known) < len(rules) or len(documents) > 1 or (remapped and not documents):
        return None
    left = min((rule.left for rule in known if rule.left >= 0), default=-1)
    right = min((rule.right for rule in known if rule.right >= 0), default=-1)
    return _Rule(left, right, documents[0] if documents else None)


def _made_by(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The function of masking_utils within which a mask function was made, and its variables."""
    if not isinstance(function, FunctionType) or function.__module__ != _masking().__name__:
        return "", {}
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    said = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    return function.__qualname__.partition(".<locals>")[0], said


def _padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    """(B, kv_length) bool, False for keys that are padding; None where there are none."""
    if attention_mask is None:
        return None
    # What lies beyond the mask is padding: slots of a cache that are not filled yet.
    missing = kv_offset + kv_length - attention_mask.shape[1]
    padding = F.pad(attention_mask.bool(), (0, max(0, missing)))
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if not _valueless(padding) and bool(padding.all()) else padding


def _valueless(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.is_meta


def _express(
    rule: _Rule, rows: int, q_length: int, kv_length: int, at_end: bool, padding: Tensor | None
) -> Mask | None:
    """A rule as a `Mask`; None where that cannot be. at_end: the last query is at the last key."""
    unlimited = rule.left < 0 and rule.right < 0
    if not (at_end or unlimited):
        return None
    left = rule.left if rule.left < kv_length - 1 else -1
    if rule.documents is not None:
        if padding is not None or q_length != kv_length:
            return None
        ends, longest = _documents(rule.documents.expand(rows, -1))
        if len(ends) == rows + 1 and not _valueless(ends):
            return Mask(left, rule.right)
        return Mask(left, rule.right, ends, ends, longest, longest)
    if padding is not None:
        found = _unpad(padding, q_length, unlimited)
        return found and Mask(left, rule.right, *found, q_length, kv_length)
    return Mask(left, rule.right)


def _documents(numbers: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens of packed rows, and the longest document.

    Args:
        numbers: (B, S); neighbours with the same number are of one document.
    """
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts, tokens = starts.flatten(), numbers.numel()
    if _valueless(numbers):  # as many as there could be, most of them empty
        order = torch.arange(tokens, device=numbers.device)
        ends = torch.where(starts, order, tokens).sort().values
    else:
        ends = starts.nonzero().squeeze(1)
    ends = F.pad(ends, (0, 1), value=tokens)
    longest = numbers.shape[1] if _valueless(numbers) else int(ends.diff().max())
    return ends.int(), longest


def _unpad(padding: Tensor, q_length: int, unlimited: bool) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens for queries and keys of padded rows; None where padding lies amid a row.

    A padded row is packed as four sequences: keys before the text, the text, queries behind it,
    keys behind it. In the first, third and fourth there are no queries or no keys, so nothing is
    computed for them. Queries before the text are in its sequence, where they come before all keys
    and see none; with no window at all every query sees the text, as in cross-attention.
    """
    if _valueless(padding):
        return None
    rows, kv_length = padding.shape
    begins = (padding[:, 1:] & ~padding[:, :-1]).sum(1) + padding[:, 0]
    if bool((begins > 1).any()):
        return None
    first = padding.int().argmax(1)
    last = first + padding.sum(1)
    none, all_queries = torch.zeros_like(first), torch.full_like(first, q_length)
    queries = all_queries if unlimited else (last + q_length - kv_length).clamp(min=0)

    def ends(length: int, *starts: Tensor) -> Tensor:
        row = torch.arange(rows, device=padding.device)[:, None] * length
        return F.pad((row + torch.stack(starts, 1)).flatten(), (0, 1), value=rows * length).int()

    of_queries = ends(q_length, none, none, queries, all_queries)
    return of_queries, ends(kv_length, none, first, last, last)


# -------------------------------------------------------------------------------- the attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention.

    Args:
        query: (B, H, Sq, D). key, value: (B, Hk, Sk, D and Dv).
        attention_mask: what `mask` made, or a tensor: bool, or to be added to the scores.
        s_aux: (H,), the sink.
        is_causal: counts where attention_mask is None; by default what the layer says.
        position_bias: added to the scores.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed documents, as a caller of
            the model may give them for flash attention.
        others: the layer's arguments for other implementations. A window among them is ignored, as
            SDPA does: what a query sees is in attention_mask.

    Returns:
        (B, Sq, H, Dv), contiguous; None for the weights, which are not kept.

    Raises:
        ValueError: the layer selects keys (sparse attention).
        TypeError: attention_mask is made for another implementation.
    """
    for name in ("indices", "block_indices", "sinks"):
        if others.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name} to attention, which gradsmith's does not "
                "take: set another attn_implementation"
            )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, _, q_length, head_size = query.shape
    kv_length, value_size = key.shape[2], value.shape[3]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and q_length > 1 and q_length != kv_length:
            # transformers means the beginning of a static cache: the first key is the first query's
            seen = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device)
            attention_mask = seen.tril()[None, None]
        else:
            attention_mask = Mask(right=0 if causal else -1)
    elif not isinstance(attention_mask, Mask | Tensor):
        raise TypeError(
            f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor, or None"
        )
    if (
        isinstance(attention_mask, Mask)
        and attention_mask.cu_seqlens_q is None
        and cu_seq_lens_q is not None
        and cu_seq_lens_k is not None
    ):
        ends = cu_seq_lens_q.int(), cu_seq_lens_k.int()
        attention_mask = Mask(
            attention_mask.left,
            attention_mask.right,
            *ends,
            rows * q_length if max_length_q is None else int(max_length_q),
            rows * kv_length if max_length_k is None else int(max_length_k),
        )
    if (
        isinstance(attention_mask, Tensor)
        or position_bias is not None
        or max(head_size, value_size) > MAX_HEAD_SIZE
        or key.shape[0] != rows
    ):
        if isinstance(attention_mask, Mask):
            attention_mask = attention_mask.dense(
                max(rows, key.shape[0]), q_length, kv_length, query.device
            )
        return _dense(
            query, key, value, attention_mask, scaling, dropout, softcap, s_aux, position_bias
        ), None
    scale = head_size**-0.5 if scaling is None else scaling
    size = max(head_size, value_size)  # they differ under multi-head latent attention
    q, k, v = (_fill(x.transpose(1, 2), size) for x in (query, key, value))
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "window_size": (attention_mask.left, attention_mask.right),
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "dropout_p": dropout,
    }
    ends_q, ends_k = attention_mask.cu_seqlens_q, attention_mask.cu_seqlens_k
    out: Any
    if ends_q is None or ends_k is None:
        out = attention(q, k, v, **options)
    else:
        out = attention_varlen(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            ends_q,
            ends_k,
            attention_mask.max_seqlen_q,
            attention_mask.max_seqlen_k,
            **options,
        )
        out = out.view(q.shape)
    return out if value_size == size else out[..., :value_size].contiguous(), None


def _fill(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sink: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention with a tensor of Sq x Sk as its mask, by PyTorch; (B, Sq, H, Dv)."""
    lowest = torch.finfo(query.dtype).min
    if bias is not None:
        mask = torch.where(mask, bias, lowest) if mask.dtype == torch.bool else mask + bias
    heads, key_heads = query.shape[1], key.shape[1]
    if not softcap and sink is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask if mask.dtype == torch.bool else mask.to(query.dtype),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=heads != key_heads,
        )
        return out.transpose(1, 2).contiguous()
    key, value = (x.repeat_interleave(heads // key_heads, 1) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.to(wide) @ key.to(wide).transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        # Not -inf, of which a row without any key would make NaN; such a row becomes 0 below.
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    else:
        scores = scores + mask
    if sink is not None:
        column = sink.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    p = torch.softmax(scores, -1)[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        p = p * mask
    p = F.dropout(p, dropout)
    return (p @ value.to(wide)).to(query.dtype).transpose(1, 2).contiguous()
