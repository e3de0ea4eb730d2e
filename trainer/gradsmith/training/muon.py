"""What Muon has to know under ZeRO: which pieces of which matrices every rank steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..ranks import device
from .deepspeed_internals import flat_partitions, shards

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from gradsmith_kernels.optim import Partition


def partitions(engine: DeepSpeedEngine) -> list[Partition]:
    """Every flat tensor that the optimizer steps, under ZeRO 1 to 3; on all ranks together."""
    from gradsmith_kernels.optim import Partition, Piece

    owners = _owners(engine)
    place = {id(owner): number for number, (owner, _) in enumerate(owners)}
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    row = {name: number for number, (name, _) in enumerate(named)}
    # A rank has at most one piece of a parameter: a table of (owner, start, length, offset).
    table = torch.full((len(named), 4), -1, dtype=torch.int64)
    for piece in shards(engine):
        number = place[id(piece.owner)]
        table[row[piece.name]] = torch.tensor([number, piece.start, piece.length, piece.offset])
    tables = [torch.empty_like(table, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, table.to(device()))
    found: list[Partition] = []
    for number, (owner, group) in enumerate(owners):
        shapes: list[tuple[int, int]] = []
        parts: list[Piece] = []
        if engine.basic_optimizer.param_groups[group]["use_muon"]:
            for (_, parameter), *rows in zip(named, *(t.tolist() for t in tables), strict=True):
                mine = [
                    Piece(len(shapes), rank, *where)
                    for rank, (bucket, *where) in enumerate(rows)
                    if bucket == number and where[1]
                ]
                if mine:
                    shapes.append(tuple(getattr(parameter, "ds_shape", parameter.shape)))
                    parts += mine
        found.append(Partition(owner, group, shapes, parts))
    return found


def _owners(engine: DeepSpeedEngine) -> list[tuple[torch.Tensor, int]]:
    """The flat tensors with their groups' indices, in the same order on all ranks."""
    flats = enumerate(flat_partitions(engine))
    if engine.zero_optimization_stage() == 3:
        return [(flat, engine.optimizer.sub_group_to_group_id[i]) for i, flat in flats]
    return [(flat, i) for i, flat in flats]
