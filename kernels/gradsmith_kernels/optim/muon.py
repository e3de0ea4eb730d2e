"""Muon: matrices step along their orthogonalised momentum, everything else as AdamW does.

A step is one sweep (rule "direction") that updates the momentum and writes what is to be
orthogonalised, in bfloat16; newton_schulz; and one sweep (rule "sgd") that applies the result.
Where ZeRO has cut the matrices into pieces, each one travels to a rank and back in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradsmith_kernels.ops.newton_schulz import COEFFICIENTS, newton_schulz
from gradsmith_kernels.ops.optimizer_step.rules import RULES
from gradsmith_kernels.ops.optimizer_step.tensors import Tensors
from gradsmith_kernels.optim.base import FusedOptimizer, check_ranges

Shape = tuple[int, int]
Orthogonalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened matrix, and where they are stepped: from
    element `offset` on of the partition that rank `rank` of the process group holds.

    matrix: index into the partition's shapes.
    """

    matrix: int
    rank: int
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """A flat tensor that is stepped in place of (pieces of) parameters.

    owner: this rank's tensor.
    group: index of its parameter group.
    shapes: of the matrices that lie in it and in its counterparts on the other ranks; none for
        a group that AdamW steps.
    pieces: of those matrices, on all ranks; shapes and pieces are the same lists on all of them.
    """

    owner: Tensor
    group: int
    shapes: Sequence[Shape] = ()
    pieces: Sequence[Piece] = ()


class Muon(FusedOptimizer):
    """Muon for the matrices of a network's hidden layers, AdamW for everything else.

        m += (1 - momentum) (g - m);   d = g + momentum (m - g) if nesterov else m
        x = (1 - lr * weight_decay) x - lr * ratio * newton_schulz(d)

    ratio is sqrt(max(1, rows / columns)) ("original") or 0.2 sqrt(max(rows, columns))
    ("match_rms_adamw", with which AdamW's lr and weight_decay fit). Stands in for
    `torch.optim.Muon`: the same arguments and defaults, and state dicts that load into torch's and
    back where all parameters are matrices. Sources: Jordan et al. 2024
    (kellerjordan.github.io/posts/muon), Liu et al. 2025 (arXiv:2502.16982).

    Args:
        params: parameters or groups. `use_muon` in a group says how it is stepped: True, all are
            matrices (of two dimensions); False, by AdamW with the group's `lr`, `betas`, `eps` and
            `weight_decay`. A group without it is split: what has two dimensions goes to Muon, all
            else, convolutions too, to AdamW. Embeddings and the output layer belong to AdamW, but
            look like matrices: put them into a group with `use_muon=False`.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            torch. eps and ns_*: of `newton_schulz`.
        adamw_lr: default lr of AdamW's groups; None is `lr`.
        adamw_betas, adamw_eps: their default betas and eps.
        l1: proximal L1 penalty, multiplied by lr.
        options: see `FusedOptimizer`.

    Beside the states it keeps 2 bytes for each element of a matrix.

    Raises:
        ValueError: an argument is outside its range, or use_muon meets what is not a matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        l1: float = 0.0,
        **options: Any,
    ) -> None:
        self._adamw = {"lr": lr if adamw_lr is None else adamw_lr, "eps": adamw_eps}
        self._partitions: dict[int, tuple[Partition, _Travels]] = {}
        defaults: dict[str, Any]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps}
        defaults |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "l1": l1}
        super().__init__(params, defaults | {"use_muon": True, "betas": adamw_betas}, **options)

    # ---------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two where `use_muon` is left out: matrices, and all else."""
        params = param_group["params"]
        if "use_muon" not in param_group and not isinstance(params, set):  # torch refuses sets
            listed = [params] if isinstance(params, Tensor) else list(params)
            sides = {
                use: [entry for entry in listed if (_tensor(entry).dim() == 2) == use]
                for use in (True, False)
            }
            for use, side in sides.items():
                if side or (use and not listed):
                    self.add_param_group({**param_group, "params": side, "use_muon": use})
            return
        if param_group.get("use_muon") is False:
            param_group = self._adamw | param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if group["use_muon"] and p.dim() != 2:
                del self.param_groups[-1]
                raise ValueError(
                    f"Muon: a parameter of a group with use_muon has shape {tuple(p.shape)}; it "
                    "must have two dimensions"
                )

    def _rule(self, group: Mapping[str, Any]) -> str:
        return "direction" if group["use_muon"] else "adam"

    def _needs_whole(self, p: Tensor, group: Mapping[str, Any]) -> str:
        return "a matrix is orthogonalised as a whole" if group["use_muon"] else ""

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if group["use_muon"]:
            return dict(group)
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "l1", "eps")
        own = {name: float(group[name]) for name in names}
        return own | {"decoupled": 1.0, "beta1": float(beta1), "beta2": float(beta2)}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_ranges("Muon", group, ("lr", "eps", "weight_decay", "l1"), ("maximize", "amsgrad"))
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"Muon: momentum is {group['momentum']}; it must be in [0, 1)")
        if not group["eps"] > 0:
            raise ValueError(f"Muon: eps is {group['eps']}; it must be > 0")
        if not 1 <= group["ns_steps"] < 100:
            raise ValueError(f"Muon: ns_steps is {group['ns_steps']}; it must be from 1 to 99")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(
                f"Muon: ns_coefficients is {group['ns_coefficients']}; it must be three numbers"
            )
        _ratio(group["adjust_lr_fn"], (1, 1))

    def _plan(self, module: Any, group: Mapping[str, Any], tensors: Tensors) -> Any:
        if not group["use_muon"]:
            return super()._plan(module, group, tensors)
        return _MuonPlan(module, tensors, self._partitions, self._backend)

    # ------------------------------------------------------------------------------ ZeRO

    def set_partitions(
        self,
        partitions: Sequence[Partition],
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Tells what lies in the flat tensors that have been put into the groups.

        From then on a step is taken together by all ranks of the process group (None: all): each
        matrix is sent to one rank, orthogonalised there, and sent back.

        Args:
            device: where matrices travel and are orthogonalised; None is where the owners are.
        """
        self._partitions = {
            id(part.owner): (part, _Travels(part, process_group, device or part.owner.device))
            for part in partitions
        }
        self._cache = None

    def new_state(self, p: Tensor) -> dict[str, Any]:
        if id(p) not in self._partitions:
            return super().new_state(p)
        state: dict[str, Any] = {}
        part, _ = self._partitions[id(p)]
        self._init_state(p, state, self.param_groups[part.group])
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_partitions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_partitions", {})
        super().__setstate__(state)


class _MuonPlan:
    """The steps of some matrices, whole or in partitions. Stands where a rule's Plan would."""

    def __init__(
        self,
        module: Any,
        tensors: Tensors,
        partitions: Mapping[int, tuple[Partition, _Travels]],
        backend: str | None,
    ) -> None:
        self._backend = backend
        self._directions = [
            torch.zeros(
                p.shape,
                dtype=torch.float64 if p.dtype == torch.float64 else torch.bfloat16,
                device=p.device,
            )
            for p in tensors.params
        ]
        self._sweep = module.Plan(
            RULES["direction"],
            replace(tensors, params=self._directions, masters=[], compensations=[]),
        )
        self._whole: dict[Shape, list[Tensor]] = {}
        self._cut: list[tuple[_Travels, Tensor]] = []
        # By shape, as the learning rate is: views of params, masters, compensations, directions.
        rows: dict[Shape, list[list[Tensor | None]]] = {}
        names = ("params", "masters", "compensations")
        columns = [*map(tensors.column, names), self._directions]
        for row in zip(*columns, strict=True):
            p, direction = row[0], row[-1]
            assert p is not None
            assert direction is not None
            part, travels = partitions.get(id(p), (None, None))
            if part is None or travels is None:
                shape = (p.shape[0], p.shape[1])
                self._whole.setdefault(shape, []).append(direction)
                rows.setdefault(shape, []).append([*row])
                continue
            self._cut.append((travels, direction))
            for piece in part.pieces:
                if piece.rank == travels.rank:
                    end = piece.offset + piece.length
                    rows.setdefault(part.shapes[piece.matrix], []).append(
                        [t if t is None else t.view(-1)[piece.offset : end] for t in row]
                    )
        self._updates = [
            (shape, self._update(module, views), [view[-1] for view in views])
            for shape, views in rows.items()
        ]

    @staticmethod
    def _update(module: Any, views: Sequence[Sequence[Tensor | None]]) -> Any:
        params, masters, compensations = (
            [tensor for tensor in column if tensor is not None]
            for column in list(zip(*views, strict=True))[:3]
        )
        steps = [torch.zeros(()) for _ in params]  # of no use to the rule
        streams = range(len(params))
        tensors = Tensors(params, [], [], [], [], [], masters, compensations, steps, streams)
        return module.Plan(RULES["sgd"], tensors)

    def step(
        self,
        grads: Sequence[Tensor],
        group: Mapping[str, Any],
        scale: float,
        zero_grads: bool,
        seed: int | None,
    ) -> None:
        options = {"momentum": group["momentum"], "nesterov": float(group["nesterov"])}
        self._sweep.step(grads, options, scale, zero_grads, seed)

        def orthogonalise(matrices: Tensor) -> Tensor:
            return newton_schulz(
                matrices,
                steps=group["ns_steps"],
                coefficients=group["ns_coefficients"],
                eps=group["eps"],
                backend=self._backend,
            )

        for directions in self._whole.values():
            _orthogonalise_all(directions, orthogonalise)
        for travels, direction in self._cut:
            travels.orthogonalise(direction, orthogonalise)
        for shape, plan, updates in self._updates:
            ratio = _ratio(group["adjust_lr_fn"], shape)
            rate = float(group["lr"]) * ratio
            decays = {name: group[name] / ratio for name in ("weight_decay", "l1")}
            plan.step(updates, {"lr": rate, "decoupled": 1.0, **decays}, 1.0, False, None)


class _Travels:
    """The way of a partition's matrices: their pieces are sent to one rank each, and back."""

    def __init__(
        self, part: Partition, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._part, self._group, self._device = part, group, device
        self.rank = dist.get_rank(group)
        # The dearest first, each to the rank with the least to do so far.
        shapes = part.shapes
        work, self._homes = [0] * dist.get_world_size(group), [0] * len(shapes)
        for matrix in sorted(range(len(shapes)), key=lambda i: -_work(shapes[i])):
            home = work.index(min(work))
            self._homes[matrix] = home
            work[home] += _work(shapes[matrix])

    def orthogonalise(self, direction: Tensor, orthogonalise: Orthogonalise) -> None:
        """In place. All ranks come here together, with their own partitions."""
        shapes, flat = self._part.shapes, direction.view(-1)
        matrices = {
            matrix: torch.empty(shapes[matrix], dtype=direction.dtype, device=self._device)
            for matrix, home in enumerate(self._homes)
            if home == self.rank
        }
        self._move(flat, matrices, home=True)
        by_shape: dict[Shape, list[Tensor]] = {}
        for matrix, tensor in matrices.items():
            by_shape.setdefault(shapes[matrix], []).append(tensor)
        for tensors in by_shape.values():
            _orthogonalise_all(tensors, orthogonalise)
        self._move(flat, matrices, home=False)

    def _move(self, flat: Tensor, matrices: Mapping[int, Tensor], home: bool) -> None:
        """Pieces of `flat` into the matrices at their homes, or back."""
        messages: list[dist.P2POp] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for piece in self._part.pieces:  # in the same order on all ranks
            at_home = self._homes[piece.matrix] == self.rank
            if not at_home and piece.rank != self.rank:
                continue
            ends: list[Tensor] = []  # here, of the way
            if piece.rank == self.rank:
                ends.append(flat[piece.offset : piece.offset + piece.length])
            if at_home:
                inside = slice(piece.start, piece.start + piece.length)
                ends.append(matrices[piece.matrix].view(-1)[inside])
            if len(ends) == 2:
                source, target = ends if home else reversed(ends)
                target.copy_(source)
                continue
            peer = piece.rank if at_home else self._homes[piece.matrix]
            if self._group is not None:
                peer = dist.get_global_rank(self._group, peer)
            if at_home == home:  # it comes here
                buffer = torch.empty_like(ends[0], device=self._device)
                arriving.append((ends[0], buffer))
                messages.append(dist.P2POp(dist.irecv, buffer, peer, self._group))
            else:
                message = ends[0].to(self._device)
                messages.append(dist.P2POp(dist.isend, message, peer, self._group))
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()
        for target, buffer in arriving:
            target.copy_(buffer)


def _orthogonalise_all(matrices: Sequence[Tensor], orthogonalise: Orthogonalise) -> None:
    """In place, matrices of one shape: one batch on a GPU, one after the other on a CPU."""
    if matrices[0].is_cuda:
        torch._foreach_copy_(list(matrices), list(orthogonalise(torch.stack(list(matrices)))))
    else:
        for matrix in matrices:
            matrix.copy_(orthogonalise(matrix))


def _work(shape: Shape) -> int:
    return math.prod(shape) * min(shape)


def _ratio(adjust_lr_fn: str | None, shape: Shape) -> float:
    """What a matrix's learning rate is multiplied with."""
    rows, columns = shape
    if adjust_lr_fn in (None, "original"):
        return math.sqrt(max(1.0, rows / columns)) if columns else 1.0
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns, 1))
    raise ValueError(
        f"Muon: adjust_lr_fn is {adjust_lr_fn!r}; allowed are None, 'original', 'match_rms_adamw'"
    )


def _tensor(entry: Any) -> Tensor:
    """A parameter, or the second of a name and a parameter."""
    tensor: Tensor = entry[1] if isinstance(entry, tuple) else entry
    return tensor
