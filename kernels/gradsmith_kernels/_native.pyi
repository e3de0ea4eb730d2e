from collections.abc import Sequence
from typing import Any

from torch import Tensor

def isa_levels() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, emulated: bool = False) -> None: ...
def parallel_runtime() -> str: ...
def rms_norm_forward(
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    y: int,
    h: int,
    rstd: int,
    rows: int,
    cols: int,
    eps: float,
    offset: float,
    x_dtype: int,
    weight_dtype: int,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    dy: int,
    dy_stride: int,
    dh: int,
    dh_stride: int,
    h: int,
    h_stride: int,
    weight: int,
    rstd: int,
    dx: int,
    partial: int,
    dweight: int,
    rows: int,
    cols: int,
    offset: float,
    x_dtype: int,
    weight_dtype: int,
    threads: int,
    /,
) -> None: ...
def layer_norm_forward(
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    bias: int,
    y: int,
    h: int,
    statistics: int,
    rows: int,
    cols: int,
    eps: float,
    x_dtype: int,
    weight_dtype: int,
    bias_dtype: int,
    threads: int,
    /,
) -> None: ...
def layer_norm_backward(
    dy: int,
    dy_stride: int,
    dh: int,
    dh_stride: int,
    h: int,
    h_stride: int,
    weight: int,
    statistics: int,
    dx: int,
    partial_weight: int,
    partial_bias: int,
    dweight: int,
    dbias: int,
    rows: int,
    cols: int,
    x_dtype: int,
    weight_dtype: int,
    bias_dtype: int,
    threads: int,
    /,
) -> None: ...
def block_count(rows: int, /) -> int: ...

_View = tuple[int, int, int, int]

def attention_forward(
    q: _View,
    k: _View,
    v: _View,
    batch: int,
    rows: int,
    cols: int,
    heads: int,
    key_heads: int,
    size: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    seed: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    lse_batch: int,
    lse_head: int,
    sink: int,
    out: int,
    lse: int,
    lse_remainder: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    q: _View,
    k: _View,
    v: _View,
    out: _View,
    dout: _View,
    batch: int,
    rows: int,
    cols: int,
    heads: int,
    key_heads: int,
    size: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    seed: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    lse_batch: int,
    lse_head: int,
    lse: int,
    lse_remainder: int,
    dlse: int,
    dq: int,
    dk: int,
    dv: int,
    delta: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def linear_product(
    a: int,
    a_stride: int,
    a_transposed: bool,
    b: int,
    b_stride: int,
    b_transposed: bool,
    bias: int,
    c: int,
    rows: int,
    columns: int,
    depth: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def glu_forward(
    gate: tuple[int, int],
    up: tuple[int, int],
    y: int,
    rows: int,
    cols: int,
    activation: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def glu_backward(
    dy: tuple[int, int],
    gate: tuple[int, int],
    up: tuple[int, int],
    gradients: tuple[int, int],
    rows: int,
    cols: int,
    activation: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def linear_cross_entropy(
    hidden: int,
    hidden_stride: int,
    weight: int,
    weight_stride: int,
    bias: int,
    target: int,
    rows: int,
    vocabulary: int,
    size: int,
    chunk: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    loss: int,
    lse: int,
    upstream: int,
    dhidden: int,
    dweight: int,
    dbias: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def rope(
    tensors: Sequence[tuple[_View, int, int]],
    cos: tuple[int, int, int],
    sin: tuple[int, int, int],
    batch: int,
    length: int,
    size: int,
    rotated: int,
    interleaved: bool,
    transposed: bool,
    dtype: int,
    table_dtype: int,
    threads: int,
    /,
) -> None: ...
def scale_rows(
    x: int,
    stride: int,
    rows: int,
    cols: int,
    factor: float,
    y: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...

class StepRow:
    def __init__(
        self,
        *,
        param: int,
        state1: int,
        state2: int,
        state3: int,
        absmax1: int,
        absmax2: int,
        master: int,
        compensation: int,
        step: int,
        numel: int,
        param_dtype: int,
        state_dtype: int,
        stream: int,
    ) -> None: ...

class StepPlan:
    def __init__(self, rows: Sequence[StepRow], /) -> None: ...
    def set_grads(self, grads: list[Tensor], /) -> None: ...
    def count(self) -> list[float]: ...
    def places(self) -> list[int]: ...
    def run(
        self,
        rule: int,
        coefficients: Sequence[tuple[Sequence[float], int]],
        for_each: bool,
        scale: float,
        zero_grad: bool,
        stochastic: bool,
        threads: int,
        /,
    ) -> list[tuple[float, float]]: ...

class Layouts:
    def __init__(self, objects: list[Any], /) -> None: ...
    def alike(self, objects: list[Any], /) -> bool: ...
    def same(self, objects: list[Any], /) -> bool: ...

def all_contiguous(tensors: list[Tensor], /) -> bool: ...
def squared_norm(grads: list[Tensor], threads: int, /) -> tuple[float, int]: ...

class FactorRow:
    def __init__(
        self,
        *,
        param: int,
        row_var: int,
        col_var: int,
        master: int,
        compensation: int,
        step: int,
        matrices: int,
        rows: int,
        cols: int,
        param_dtype: int,
    ) -> None: ...

class AdafactorPlan:
    def __init__(self, rows: Sequence[FactorRow], /) -> None: ...
    def set_grads(self, grads: list[Tensor], /) -> None: ...
    def count(self) -> list[float]: ...
    def run(
        self,
        coefficients: Sequence[tuple[float, float, float, float, float, float, float]],
        scale: float,
        zero_grad: bool,
        threads: int,
        /,
    ) -> None: ...

def augment(
    sources: int,
    ops: int,
    parameters: int,
    outputs: int,
    shape: tuple[int, int, int],
    dtype: int,
    seed: int,
    places: int,
    normal: int,
    threads: int,
    /,
) -> None: ...
def augment_uniform_numbers(
    places: int, count_of_places: int, seed: int, stream: int, count: int, numbers: int, /
) -> None: ...
def augment_mix_pairs(
    images: int, pairs: int, elements: int, dtype: int, keep: int, threads: int, /
) -> None: ...
def augment_swap_boxes(
    images: int,
    shape: tuple[int, int, int, int],
    element_size: int,
    boxes: int,
    threads: int,
    /,
) -> None: ...
