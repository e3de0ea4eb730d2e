"""What all optimizers of `gradsmith_kernels.optim` share: groups, norms, skipped steps, states."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradsmith_kernels.ops.optimizer_step.op import OP
from gradsmith_kernels.ops.optimizer_step.rules import RULES
from gradsmith_kernels.ops.optimizer_step.tensors import STATE_BLOCK, Tensors, check
from gradsmith_kernels.optim.sharded import Cut, add_up, cut_of, is_dtensor, local, local_gradient

if TYPE_CHECKING:
    from gradsmith_kernels._native import Layouts

WEIGHTS = ("rounded", "master", "kahan")
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_EITHER = (None, True, False)
# Arguments of torch's optimizers that choose between implementations of one result, or that say
# what ours do anyway, and the values that are taken here.
OF_TORCH = {"foreach": _EITHER, "fused": _EITHER, "differentiable": (False,)}


@dataclass
class _Batch:
    """Parameters of one group on one device that are stepped in one sweep."""

    group: int
    indices: list[int]  # among all parameters of the optimizer
    params: list[Tensor]
    cut: Cut | None
    check: Callable[[Sequence[Tensor]], None]  # of gradients that look other than the last ones
    plan: Any
    norm: Callable[[list[Tensor]], tuple[float, int]]
    grads: list[Tensor]  # this step's


@dataclass
class _Cache:
    """The batches, and what they were made of: anything that has changed makes them anew.

    The layouts are compared at every step, so no address is stepped of which it is not known that
    the tensor is there and has the sizes and strides that were checked (`.data` may be assigned).
    """

    batches: list[_Batch]
    params: list[Tensor]
    rules: list[str]
    sharded: bool  # some parameters are DTensors
    layouts: Layouts  # of parameters and states
    grads: Layouts
    present: list[bool]


class FusedOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose step is one sweep over all tensors.

    Keyword arguments of every subclass:
        max_grad_norm: scale the gradients so that the norm of all of them together is at most
            this. A step whose norm is not finite is skipped: nothing changes, and a warning names
            the first parameter whose gradient is to blame. math.inf measures and checks only; None
            (the default) does neither, as in torch. The norm is in `grad_norm` afterwards.
        process_group: ranks whose gradients belong together (each holds a part of them): the norm
            is that of all parts, and a step is skipped by all or none.
        zero_grads: set the gradients to zero in the sweep, after they were used (or skipped).
        weights: what stands behind a bfloat16 or float16 parameter: "rounded", nothing; "master",
            a float32 copy; "kahan", a bfloat16 remainder that is added before the next rounding.
        state_dtype: torch.float32 or torch.bfloat16, whatever the parameters' dtype.
        stochastic_rounding: round bfloat16 states randomly (nearest would lose small changes).
        seed: of that rounding, which depends on nothing else but the step and the element.
        backend: reference, cpu or triton; None chooses by the parameters' device.
    """

    state_names: ClassVar[tuple[str, ...]] = ()  # of the rule with the most
    of_torch: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # arguments that change nothing
    counted: ClassVar[tuple[str, ...]] = ()  # entries of a group that steps change
    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        zero_grads: bool = False,
        weights: str = "rounded",
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str | None = None,
        **of_torch: Any,
    ) -> None:
        name = type(self).__name__
        for option, value in of_torch.items():
            if option not in self.of_torch:
                raise TypeError(f"{name}: there is no argument {option!r}")
            if not any(value is allowed for allowed in self.of_torch[option]):
                allowed = " or ".join(map(str, self.of_torch[option]))
                raise ValueError(f"{name}: {option} is {value!r}; it must be {allowed}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{name}: max_grad_norm is {max_grad_norm}; it must be > 0 or None")
        if weights not in WEIGHTS:
            raise ValueError(f"{name}: weights is {weights!r}; allowed are {', '.join(WEIGHTS)}")
        if state_dtype not in self._state_dtypes():
            allowed = " or ".join(str(dtype) for dtype in self._state_dtypes())
            raise ValueError(f"{name}: state_dtype is {state_dtype}; it must be {allowed}")
        self.max_grad_norm, self.process_group = max_grad_norm, process_group
        self.zero_grads, self.weights, self.state_dtype = zero_grads, weights, state_dtype
        self.stochastic_rounding, self.seed, self._backend = stochastic_rounding, seed, backend
        self.grad_norm: float | None = None
        self._cache: _Cache | None = None
        super().__init__(params, defaults)

    # ---------------------------------------------------------------- what a subclass says

    def _rule(self, group: Mapping[str, Any]) -> str:
        """The rule of a group: a name in RULES."""
        raise NotImplementedError

    def _options(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The rule's options for this step."""
        raise NotImplementedError

    def _needs_whole(self, p: Tensor, group: Mapping[str, Any]) -> str:
        """Why a step of this parameter takes more than its elements one by one; "" if it does
        not."""
        return ""

    def _state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the rule's states."""
        return self.state_names[: RULES[self._rule(group)].states]

    def _plan(self, module: Any, group: Mapping[str, Any], tensors: Tensors) -> Any:
        """What makes the steps of a batch."""
        return module.Plan(RULES[self._rule(group)], tensors)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for an option outside its range."""
        raise NotImplementedError

    @staticmethod
    def _state_dtypes() -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16)

    def _state_dtype(self, p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype == torch.float64 else self.state_dtype

    # ------------------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # torch.compile breaks its graph here; torch does it lazily, as here
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. Parameters without a gradient are left as they are.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            TypeError: a parameter or gradient is sparse, complex or of another dtype; or it is a
                DTensor that is cut into shards, and this optimizer needs whole ones.
            ValueError: a gradient or state has another shape than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        batches: list[_Batch] = []
        scale = None
        if found_inf is None or not float(found_inf):
            batches = self._batches()
            scale = self._scale(batches)
        if scale is None:
            if self.zero_grads:
                self.zero_grad(set_to_none=False)
            return loss
        for batch in batches:
            group = self.param_groups[batch.group]
            sign = -1 if group.get("maximize") else 1
            self._advance(batch.plan, batch.grads, group, sign * scale)
            # Autograd then refuses to go back through a graph that has seen the old weights.
            torch.autograd.graph.increment_version(batch.params)
            if self.zero_grads:
                torch.autograd.graph.increment_version(batch.grads)
        self._after_step()
        return loss

    def _advance(
        self, plan: Any, grads: list[Tensor], group: Mapping[str, Any], scale: float
    ) -> None:
        """One step of a plan that `_prepare` made."""
        rounding = self.seed if self.stochastic_rounding else None
        plan.step(grads, self._options(group), scale, self.zero_grads, rounding)

    def _after_step(self) -> None:
        """What is left to do after a step that was not skipped."""

    def _scale(self, batches: Sequence[_Batch]) -> float | None:
        """What the gradients are multiplied with; None if the step is to be skipped."""
        scale = 1.0
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            scale = 1 / float(grad_scale)
        if self.max_grad_norm is None:
            return scale
        parts: dict[Cut | None, float] = {}
        bad = None
        for batch in batches:
            part, index = batch.norm(batch.grads)
            parts[batch.cut] = parts.get(batch.cut, 0.0) + part
            if bad is None and index >= 0:
                bad = batch.indices[index]
        squares = add_up(parts)
        if self.process_group is not None:
            total = torch.tensor(squares, dtype=torch.float64, device=self._norm_device())
            dist.all_reduce(total, group=self.process_group)
            squares = float(total)
        self.grad_norm = norm = math.sqrt(squares) * scale if squares >= 0 else math.nan
        if not math.isfinite(norm):
            whose = "on another rank" if bad is None else f"of {self._name(bad)}"
            warnings.warn(
                f"{type(self).__name__}: step skipped: the gradient {whose} is not finite",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        return scale * min(1.0, self.max_grad_norm / (norm + 1e-6))

    def _norm_device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device  # type: ignore[no-any-return]

    def _name(self, index: int) -> str:
        for number, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                names = group.get("param_names")
                p = group["params"][index]
                named = names[index] if names else f"params[{index}] of group {number}"
                return f"{named}, shape {tuple(p.shape)},"
            index -= len(group["params"])
        raise IndexError(index)

    # ---------------------------------------------------------------------------- batches

    def _batches(self) -> list[_Batch]:
        params = [p for group in self.param_groups for p in group["params"]]
        cache = self._cache
        if cache is None or not self._unchanged(cache, params):
            cache = self._cache = self._build(params)
            return cache.batches
        grads = self._gradients(params, cache.sharded)
        if not cache.grads.alike(grads):
            if [g is not None for g in grads] != cache.present:
                self._cache = self._build(params)
                return self._cache.batches
            for batch in cache.batches:
                batch.check(_chosen(grads, batch.indices))
            cache.grads = _layouts(grads)
        for batch in cache.batches:
            batch.grads = _chosen(grads, batch.indices)
        return cache.batches

    def _unchanged(self, cache: _Cache, params: Sequence[Tensor]) -> bool:
        return (
            _same(params, cache.params)
            and list(map(self._rule, self.param_groups)) == cache.rules
            and cache.layouts.same(self._watched(params, cache.sharded))
        )

    def _watched(self, params: Sequence[Tensor], sharded: bool) -> list[Any]:
        """Whatever a step writes to."""
        watched = [*params, *chain.from_iterable(map(dict.values, self.state.values()))]
        return list(map(local, watched)) if sharded else watched

    @staticmethod
    def _gradients(params: Sequence[Tensor], sharded: bool) -> list[Tensor | None]:
        return [local_gradient(p) for p in params] if sharded else [p.grad for p in params]

    def _build(self, params: list[Tensor]) -> _Cache:
        collected: dict[Any, list[int]] = {}
        index = 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    self._check_parameter(p, group)
                    state = self.state[p]
                    if not state:
                        self._init_state(p, state, group)
                    layout = ("master" in state, "compensation" in state, "absmax1" in state)
                    key = (number, p.device, p.dtype == torch.float64, cut_of(p), *layout)
                    collected.setdefault(key, []).append(index)
                index += 1
        sharded = any(map(is_dtensor, params))
        grads = self._gradients(params, sharded)
        return _Cache(
            [self._batch(key[0], indices, params, grads) for key, indices in collected.items()],
            params,
            list(map(self._rule, self.param_groups)),
            sharded,
            _layouts(self._watched(params, sharded)),
            _layouts(grads),
            [g is not None for g in grads],
        )

    def _batch(
        self, number: int, indices: list[int], params: list[Tensor], grads: list[Tensor | None]
    ) -> _Batch:
        whole = [params[i] for i in indices]
        chosen = [local(p) for p in whole]
        group, device, dtype = self.param_groups[number], chosen[0].device, chosen[0].dtype
        states = [{key: local(value) for key, value in self.state[p].items()} for p in whole]
        check_grads, make_plan = self._prepare(group, chosen, states, indices)
        found = _chosen(grads, indices)
        check_grads(found)
        norm = OP.choose(self._backend, device, dtype).squared_norm
        cut = cut_of(whole[0])
        return _Batch(number, indices, whole, cut, check_grads, make_plan(), norm, found)

    def _prepare(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any]],
        streams: list[int],
    ) -> tuple[Callable[[Sequence[Tensor]], None], Callable[[], Any]]:
        """A check of gradients for these parameters, and what makes the plan of their steps."""
        rule = RULES[self._rule(group)]
        names = (*self._state_names(group), "", "", "")  # of no column
        tensors = Tensors(
            params,
            column(states, names[0]),
            column(states, names[1]),
            column(states, names[2]),
            column(states, "absmax1"),
            column(states, "absmax2"),
            column(states, "master"),
            column(states, "compensation"),
            column(states, "step"),
            streams,
        )
        module = OP.choose(self._backend, params[0].device, params[0].dtype)
        return partial(check, rule, tensors), lambda: self._plan(module, group, tensors)

    def _check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        assert p.grad is not None
        name, shape = type(self).__name__, tuple(p.shape)
        for what, tensor in (("parameter", p), ("gradient", p.grad)):
            if tensor.layout != torch.strided or tensor.is_complex():
                kind = "complex" if tensor.is_complex() else str(tensor.layout)
                raise TypeError(
                    f"{name}: a {what} of shape {shape} is {kind}; it must be dense and real"
                )
            part = local(tensor)
            if part.numel() and part.device.type != "meta" and not part.data_ptr():
                kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
                raise TypeError(
                    f"{name}: a {what} of shape {shape}, a {kind}, has no memory that could be "
                    "stepped; it must be a plain tensor or a DTensor"
                )
        if is_dtensor(p) != is_dtensor(p.grad):
            one, other = ("a DTensor", "none") if is_dtensor(p) else ("no DTensor", "one")
            raise TypeError(
                f"{name}: a parameter of shape {shape} is {one} and its gradient {other}; "
                "both must be, or neither"
            )
        why = self._needs_whole(p, group)
        if why and cut_of(p) is not None:
            placements: Any = p
            raise TypeError(
                f"{name}: a parameter of shape {shape} is a DTensor that is cut into shards "
                f"{tuple(placements.placements)}, and {why}; keep it whole (outside of "
                "fully_shard, or as Replicate()), or let AdamW step it"
            )

    # ----------------------------------------------------------------------------- states

    def _init_state(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        self._init_moments(p, state, group)
        if p.dtype in _SIXTEEN_BIT:
            if self.weights == "master":
                state["master"] = p.detach().to(torch.float32, copy=True)
            elif self.weights == "kahan":
                state["compensation"] = zeros_like(p, torch.bfloat16)

    def _init_moments(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Adds the states that are the update rule's own."""
        for i, name in enumerate(self._state_names(group)):
            dtype = self._state_dtype(p)
            state[name] = zeros_like(p, dtype)
            if dtype == torch.uint8:
                if i == 0:
                    state[name].fill_(127)  # the code of 0
                blocks = -(-p.numel() // STATE_BLOCK)
                state[f"absmax{i + 1}"] = torch.zeros(blocks, device=p.device)

    def new_state(self, p: Tensor) -> dict[str, Any]:
        """The state that `p` starts with, for whoever restores one piece by piece."""
        groups = (g for g in self.param_groups if any(q is p for q in g["params"]))
        state: dict[str, Any] = {}
        self._init_state(p, state, next(groups, self.param_groups[0]))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of its counterpart in torch."""
        super().load_state_dict(state_dict)
        # torch has cast every state to its parameter's dtype: take them again from the dict.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(saved, params, strict=True):
            if state_dict["state"].get(i):
                state: dict[str, Any] = {}
                self._init_state(p, state, group)
                self._adopt(p, state, state_dict["state"][i])
                self.state[p] = state
        self._cache = None

    def _adopt(self, p: Tensor, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Fills a fresh state from a saved one."""
        for name in (*state,):
            value = saved.get(name)
            if value is None:  # torch's SGD counts no steps, and no one else has masters
                if name == "step":
                    state[name].fill_(1)
                continue
            value = value if isinstance(value, Tensor) else torch.as_tensor(value)
            own = state[name]
            if value.shape != own.shape and not (name == "step" and value.numel() == 1):
                raise ValueError(
                    f"{type(self).__name__}: the state dict's {name} has shape "
                    f"{tuple(value.shape)} for a parameter of shape {tuple(p.shape)}; it must be "
                    f"{tuple(own.shape)}"
                )
            if is_dtensor(value) != is_dtensor(own):
                one, other = ("a DTensor", "not") if is_dtensor(value) else ("no DTensor", "one")
                raise ValueError(
                    f"{type(self).__name__}: the state dict's {name} for a parameter of shape "
                    f"{tuple(p.shape)} is {one} and the parameter is {other}; "
                    "torch.distributed.checkpoint.state_dict converts whole states and shards"
                )
            own.copy_(value.reshape(own.shape))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._check_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "process_group")}


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _chosen(grads: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
    return [grads[i] for i in indices]  # type: ignore[misc]  # those of a batch are there


def _layouts(objects: list[Any]) -> Layouts:
    from gradsmith_kernels import _native  # not above: `backends` says why it may be missing

    return _native.Layouts(objects)


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A state for a parameter: contiguous, and a DTensor like it."""
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)


def column(states: Sequence[Mapping[str, Any]], name: str) -> list[Tensor]:
    """One state of every parameter; empty where they have none of this name."""
    return [state[name] for state in states] if name in states[0] else []


def check_ranges(
    name: str, group: Mapping[str, Any], at_least_zero: Iterable[str], unsupported: Iterable[str]
) -> None:
    """
    Raises:
        ValueError: one of the numbers is negative, betas are outside [0, 1), or an option of the
            counterpart in torch is set that changes the algorithm.
    """
    if "betas" in group:
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"{name}: betas is {group['betas']}; it must be two numbers in [0, 1)")
    for option in at_least_zero:
        if not float(group[option]) >= 0:
            raise ValueError(f"{name}: {option} is {group[option]}; it must be a number >= 0")
    for option in unsupported:
        if group.get(option):
            raise ValueError(f"{name}: {option}={group[option]} is not supported")
