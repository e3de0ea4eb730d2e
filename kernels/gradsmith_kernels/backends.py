"""The four backends, what this machine has of them, and the choice between them.

A backend of an op is a module with the op's functions:

- `reference`  plain PyTorch, any device and any floating dtype: the definition;
- `cpu`        the C++ kernels of the native module, on the CPU;
- `triton`     Triton kernels, on the GPU (and, under TRITON_INTERPRET=1, in its interpreter);
- `cuda`       CUDA C++ kernels, where they beat Triton.

With `backend=None` the tensor's device and dtype decide: the op's kernels for that device, or the
reference for a dtype which no kernel takes (float64). Nothing falls back silently: a backend that
is asked for, or that the device calls for, and is not there raises with the reason.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class BackendError(RuntimeError):
    """A backend was asked for that this machine, or this op, does not have."""


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_before(major: int, minor: int) -> bool:
    """Whether Triton is older: other compilers make other code, for which kernels take other tiles
    or warps where registers would spill."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)


@functools.cache
def missing(backend: str) -> str | None:
    """Why this machine does not have `backend`; None if it has it."""
    if backend == "cpu":
        try:
            importlib.import_module("gradsmith_kernels._native")
        except ImportError as error:
            if "GRADSMITH_ISA" in str(error):
                return str(error)
            return f"the native module is not built ({error}): run pip install -e . with a compiler"
    elif backend == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if interpreting():
            return _interpreters_fault()
        if not torch.cuda.is_available():
            return "torch finds no GPU"
    elif backend == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


def _interpreters_fault() -> str | None:
    """Triton 3.6 takes the bound of a loop, an array of one element, for a number; NumPy 2.4 does
    not any more."""
    import numpy

    if triton_before(3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return f"the interpreter of Triton 3.6 needs numpy<2.4, and this is {numpy.__version__}"
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend of one op: the module that holds it, and the dtypes it takes."""

    module: str
    dtypes: tuple[torch.dtype, ...]


class Op:
    """An op's table backend -> implementation, and the choice from it."""

    def __init__(self, name: str, implementations: Mapping[str, Implementation]) -> None:
        self.name = name
        self.implementations = dict(implementations)
        self._chosen: dict[tuple[str | None, str, torch.dtype], ModuleType] = {}

    def missing(self, backend: str) -> str | None:
        """Why `backend` cannot run this op here; None if it can."""
        if backend not in self.implementations:
            return f"{self.name} has no {backend} implementation"
        return missing(backend)

    def fits(self, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `backend` runs this op here, for tensors of `dtype` on `device`."""
        return not (self.missing(backend) or self._unfit(backend, device.type, dtype))

    def choose(self, backend: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
        """The module that runs this op for tensors of `dtype` on `device`; decided once."""
        key = (backend, device.type, dtype)
        if key not in self._chosen:
            name = self.resolve(*key)
            self._chosen[key] = importlib.import_module(self.implementations[name].module)
        return self._chosen[key]

    def resolve(self, backend: str | None, device: str, dtype: torch.dtype) -> str:
        """The backend's name: `backend` if it is given and possible, else the one for the device.

        Raises ValueError for an unknown name, BackendError where the choice cannot be met.
        """
        if backend is None:
            backend = self._default(device, dtype)
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
        reason = self.missing(backend) or self._unfit(backend, device, dtype)
        if reason:
            raise BackendError(
                f"{self.name}: the {backend} backend cannot run here: {reason}. "
                f"backend='reference' runs everywhere."
            )
        return backend

    def _default(self, device: str, dtype: torch.dtype) -> str:
        candidates = [b for b in _PREFERENCE.get(device, ()) if b in self.implementations]
        if not candidates:
            raise BackendError(
                f"{self.name}: no backend is made for device {device!r}; pass backend='reference'"
            )
        if not any(dtype in self.implementations[b].dtypes for b in candidates):
            return "reference"
        present = [b for b in candidates if missing(b) is None]
        return (present or candidates)[0]

    def _unfit(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        if dtype not in self.implementations[backend].dtypes:
            names = ", ".join(str(d) for d in self.implementations[backend].dtypes)
            return f"it takes {names}, not {dtype}"
        if backend == "triton" and interpreting() and dtype == torch.bfloat16:
            return "Triton's interpreter is silently wrong on bfloat16 (it truncates)"
        if backend == "cpu" and device != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        if backend == "triton" and device == "cpu" and not interpreting():
            return "the tensors are on the CPU (only TRITON_INTERPRET=1 runs Triton there)"
        if backend == "cuda" and device != "cuda":
            return f"the tensors are on {device}, not on a GPU"
        return None


def op_names() -> list[str]:
    """Every op: the folders of ops/, but for what they share."""
    found = pkgutil.iter_modules(importlib.import_module("gradsmith_kernels.ops").__path__)
    return sorted(module.name for module in found if module.ispkg and module.name != "common")


def availability() -> dict[str, dict[str, str | None]]:
    """The table op -> backend -> why it cannot run here (None: it can)."""
    modules = {name: f"gradsmith_kernels.ops.{name}.op" for name in op_names()}
    modules["augment"] = "gradsmith_kernels.augment.pipeline"  # a room, but it has backends as well
    table = {}
    for name, module in sorted(modules.items()):
        op: Op = importlib.import_module(module).OP
        table[name] = {backend: op.missing(backend) for backend in BACKENDS}
    return table


def native() -> dict[str, Any] | None:
    """The native module's isa, isa_levels of this machine, threading; None if not built."""
    if missing("cpu"):
        return None
    module = importlib.import_module("gradsmith_kernels._native")
    return {
        "isa": module.isa(),
        "isa_levels": module.isa_levels(),
        "threading": module.parallel_runtime(),
    }


def chosen(name: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that op `name` takes on `device` for `dtype` when none is asked for."""
    op: Op = importlib.import_module(f"gradsmith_kernels.ops.{name}.op").OP
    return op.resolve(None, device, dtype)


# ------------------------------------------------------------------------------------ precision

# A training step's speed in bfloat16 over that in float32, for each level of the instruction set,
# with our kernels under the model. Measured on an Intel CPU held down to each level, but
# avx512bf16, which stands for Zen 4 and is estimated from its products (2.2 times).
_BF16_OVER_FP32 = {"portable": 0.9, "avx2": 1.13, "avx512": 1.14, "avx512bf16": 1.4, "amx": 2.2}
# The same with torch's products alone: below avx512bf16 torch widens bfloat16 in a slow loop.
_TORCHS_BF16_OVER_FP32 = _BF16_OVER_FP32 | {"portable": 0.27, "avx2": 0.14, "avx512": 0.47}

X86 = platform.machine() in ("x86_64", "AMD64")

# What oneDNN may use, where its environment variable holds it down; other values do not lower it.
_ONEDNN_LEVELS = {
    "SSE41": "portable",
    "AVX": "portable",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512",
    "AVX512_CORE_BF16": "avx512bf16",
    "AVX512_CORE_FP16": "avx512bf16",
}


class Bf16(NamedTuple):
    """Whether a device trains at least as fast in bfloat16 as in float32."""

    fast: bool
    device: str
    """The device, in what decides: "this CPU (avx2)", a GPU's name."""
    ratio: float | None
    """The speed in bfloat16 over that in float32, measured on such a device; None: not measured."""


def fast_bf16(device: torch.device | str, kernels: bool = True) -> Bf16:
    """Whether bfloat16 is the precision to train in on `device`.

    A GPU has it in hardware or not. On a CPU the instruction set decides: that of the native
    module (GRADSMITH_ISA holds it down), or that of torch's products where ONEDNN_MAX_CPU_ISA
    holds those down further.

    kernels: whether ours are under the model. Where torch multiplies bfloat16 in a slow loop, the
        linear layers are ours on x86, and as fast as in float32 (docs/log.md, "16 bits on AVX2").
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Bf16(fast, torch.cuda.get_device_name(device), None)
    level = _products_level()
    if level is None:
        return Bf16(False, "this CPU (instruction set unknown without the native module)", None)
    ratio = (_BF16_OVER_FP32 if kernels and X86 else _TORCHS_BF16_OVER_FP32)[level]
    return Bf16(ratio >= 1, f"this CPU ({level})", ratio)


def torch_multiplies_bf16() -> bool:
    """Whether torch's bfloat16 products on this CPU are not its slow loop."""
    return _products_level() in ("avx512bf16", "amx")


@functools.cache
def _held_down() -> str | None:
    """The level that oneDNN's variable holds torch's products down to; oneDNN reads it once."""
    variables = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    asked = next((value for name in variables if (value := os.environ.get(name))), "")
    return _ONEDNN_LEVELS.get(asked.upper())


def _products_level() -> str | None:
    """The lower of the native module's level and that of torch's products."""
    found = native()
    if found is None:
        return None
    levels = list(_BF16_OVER_FP32)
    held_down = levels.index(_held_down() or levels[-1])
    return levels[min(levels.index(found["isa"]), held_down)]
