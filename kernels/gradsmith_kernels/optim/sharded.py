"""Parameters that are DTensors (FSDP2's fully_shard, tensor parallel): each rank steps its shard.

What a step reads and writes are the local tensors; states are DTensors like their parameter, so
that state dicts are those that torch's optimizers make. Only the norm of all gradients needs the
other ranks: its squares are added up along the dimensions of the mesh that a parameter is cut
along, and not along those that hold copies of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Cut = tuple[Any, tuple[int, ...]]  # a device mesh, and the dimensions of it that a tensor is cut in


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: then there are none
    return module is not None and isinstance(value, module.DTensor)


def local(value: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is. Without gradients."""
    return value.to_local() if is_dtensor(value) else value


def local_gradient(p: Tensor) -> Tensor | None:
    """This rank's part of the gradient, for its part of the parameter. Sums that are still spread
    over ranks (Partial) are added up first; the parameter then keeps the result."""
    g: Any = p.grad
    of: Any = p
    if is_dtensor(g) and is_dtensor(p) and g.placements != of.placements:
        p.grad = g = g.redistribute(of.device_mesh, of.placements)
    return local(g)  # type: ignore[no-any-return]


def cut_of(p: Any) -> Cut | None:
    """How a parameter is cut; None if this rank has all of it."""
    if not is_dtensor(p):
        return None
    mesh = p.device_mesh
    dims = [i for i, kind in enumerate(p.placements) if not kind.is_replicate()]
    dims = [i for i in dims if mesh.size(i) > 1]
    return (mesh, tuple(dims)) if dims else None


def add_up(squares: Mapping[Cut | None, float]) -> float:
    """The sum over all ranks of what each one has of the parameters that are cut like this. Ranks
    call it together, with the same keys."""
    total = 0.0
    for cut, part in squares.items():
        if cut is not None:
            mesh, dims = cut
            whole = torch.tensor(part, dtype=torch.float64, device=mesh.device_type)
            for dim in dims:
                dist.all_reduce(whole, group=mesh.get_group(dim))
            part = float(whole)
        total += part
    return total
