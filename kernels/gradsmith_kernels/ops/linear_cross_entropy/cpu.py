"""Linear cross-entropy on the CPU: csrc/linear_cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsmith_kernels import _native
from gradsmith_kernels.ops.common.native import DTYPE_CODES, as_rows
from gradsmith_kernels.ops.linear_cross_entropy.reference import TILE_ROOM, Options

GRADIENTS_IN_FORWARD = True
TOKENS = 96  # the kernels' unit: other chunks end in partly filled blocks


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    loss, lse = (torch.empty(len(hidden), dtype=torch.float64) for _ in range(2))
    _run(loss, lse, None, hidden, weight, bias, target, options, (None, None, None))
    return loss, lse


def forward_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The same, and the gradients of the losses' sum into float32 memory (`gradient_shapes`)."""
    loss, lse = (torch.empty(len(hidden), dtype=torch.float64) for _ in range(2))
    _run(loss, lse, None, hidden, weight, bias, target, options, gradients)
    for gradient, rows in zip(gradients, (len(hidden), len(weight), len(weight)), strict=True):
        if gradient is not None:
            gradient[rows:].zero_()  # the room at the end: an operator's outputs are all defined
    return loss, lse


def backward(
    upstream: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (N, C), dweight (V, C) and dbias (V,); empty for what is not needed."""
    (rows, size), vocabulary = hidden.shape, len(weight)
    shapes = gradient_shapes(rows, vocabulary, size, needs)
    sums = [torch.empty(shape, dtype=torch.float32) for shape in shapes]
    wanted = [buffer if need else None for buffer, need in zip(sums, needs, strict=True)]
    upstream = upstream.float().contiguous()
    lse = lse.contiguous()
    _run(None, lse, upstream, hidden, weight, bias, target, options, (*wanted,))
    dhidden = scale(sums[0], rows if needs[0] else 0, size, 1.0, hidden.dtype)
    dweight = scale(sums[1], vocabulary if needs[1] else 0, size, 1.0, hidden.dtype)
    return dhidden, dweight, sums[2].to(hidden.dtype)


def gradient_shapes(
    rows: int, vocabulary: int, size: int, needs: tuple[bool, bool, bool]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the sums that the kernels write: whole vectors and tiles, so with room at the end."""
    columns = (size + 15) // 16 * 16
    return (
        (rows + TILE_ROOM, columns) if needs[0] else (0, 0),
        (vocabulary + TILE_ROOM, columns) if needs[1] else (0, 0),
        (vocabulary,) if needs[2] else (0,),
    )


def scale(sums: Tensor, rows: int, size: int, factor: float, dtype: torch.dtype) -> Tensor:
    """The first rows and columns of a gradient times `factor`, rounded once."""
    result = torch.empty((rows, size) if len(sums) else (0,), dtype=dtype)
    if result.numel():
        _native.scale_rows(
            sums.data_ptr(),
            sums.stride(0),
            rows,
            size,
            factor,
            result.data_ptr(),
            DTYPE_CODES[dtype],
            torch.get_num_threads(),
        )
    return result


def tokens_at_a_time(rows: int, vocabulary: int) -> int:
    """The chunk: 64 MiB of logits, but enough tokens for dweight's sums to be worth their memory
    traffic, and chunks of one length."""
    most = min(max(2**24 // vocabulary, 3 * TOKENS), 10 * TOKENS)
    chunks = -(-rows // most)
    return -(-rows // (chunks * TOKENS)) * TOKENS


def _run(
    loss: Tensor | None,
    lse: Tensor,
    upstream: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Options,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """One call of the kernels: they write loss, lse and gradients, of what is not None."""
    (rows, size), vocabulary = hidden.shape, len(weight)
    if rows == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    if size == 0:  # then bias is all there is
        size, gradients = 1, (None, None, gradients[2])
        hidden, weight = hidden.new_zeros(rows, 1), weight.new_zeros(vocabulary, 1)
    hidden_rows, hidden_stride = as_rows(hidden)
    weight_rows, weight_stride = as_rows(weight)
    bias = None if bias is None else bias.contiguous()
    target = target.contiguous()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    dhidden, dweight, dbias = map(address, gradients)
    _native.linear_cross_entropy(
        hidden_rows.data_ptr(),
        hidden_stride,
        weight_rows.data_ptr(),
        weight_stride,
        address(bias),
        target.data_ptr(),
        rows,
        vocabulary,
        size,
        options.chunk or tokens_at_a_time(rows, vocabulary),
        options.label_smoothing,
        options.z_loss,
        options.softcap,
        address(loss),
        lse.data_ptr(),
        address(upstream),
        dhidden,
        dweight,
        dbias,
        DTYPE_CODES[hidden.dtype],
        torch.get_num_threads(),
    )
