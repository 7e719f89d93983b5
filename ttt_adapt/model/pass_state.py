"""What a model's own passes change in it, beside its parameters: kept out of passes that are not predictions.

Observers of quantisation-aware training and running averages change buffers, in evaluation mode too. Recurrent models
and models that shift features in time keep something of the frame before, in buffers or in plain attributes. Some
models count their calls.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Absent:
    """Stands, as a class, for the value of a place that has none: a class stays itself in copies and pickles."""


class _Slot(NamedTuple):
    """A place of a value: a buffer of a module, or an attribute of a module or of an object that it holds."""

    owner: Any
    buffer: bool
    name: str

    @property
    def table(self) -> dict[str, Any]:
        """Where the value is, under its name."""
        return self.owner._buffers if self.buffer else vars(self.owner)


class _Change(NamedTuple):
    """A place that passes change.

    Attributes:
        slot: which.
        first: a copy of its value before the first pass; `_Absent` where there was none.
        steady: whether it keeps type and shape in a pass.
    """

    slot: _Slot
    first: Any
    steady: bool


class PassState:
    """Buffers and plain attributes of a model that its passes change.

    The first pass that runs inside of `kept`, in each mode of the model, shows which ones these are. Later passes cost
    nothing where there are none.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[bool, list[_Change]] = {}

    @property
    def changing(self) -> list[str]:
        """Names of what a pass in evaluation mode was seen to change; empty before the first one."""
        return [change.slot.name for change in self._known.get(False, [])]

    @contextmanager
    def kept(self, learn: bool = True) -> Iterator[None]:
        """Inside the block, passes change copies; afterwards the model has its own values again, in the same objects.

        A value that takes another type or shape in a pass, such as a memory of the frame before, begins each block as
        it was before the first pass. Other values begin as they are.

        Args:
            learn: whether the first pass may be one of this block; otherwise, nothing is kept before it.
        """
        training = self._model.training
        known = self._known.get(training)
        if known is None and not learn:
            yield
            return
        if known is None:
            found: list[_Change] = []
            yield from _watched(self._model, found)
            self._known[training] = found
            return
        memo: dict[int, Any] = {}
        before = [(slot, slot.table.get(slot.name, _Absent)) for slot, _, _ in known]
        for (slot, first, steady), (_, now) in zip(known, before, strict=True):
            _put(slot, _copy(now if steady else first, memo))
        try:
            yield
        finally:
            for slot, value in before:
                _put(slot, value)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """As `kept`, around a part of a pass: it does not show all that a whole one changes."""
        if self._model.training in self._known:
            with self.kept():
                yield
        else:
            yield from _watched(self._model, [])

    def memory(self) -> list[tuple[_Slot, Any]]:
        """Copies of all that passes in evaluation mode are known to change, as it is."""
        memo: dict[int, Any] = {}
        slots = [change.slot for change in self._known.get(False, [])]
        return [(slot, _copy(slot.table.get(slot.name, _Absent), memo)) for slot in slots]

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, memory: Sequence[tuple[_Slot, Any]]) -> None:
        """Write what `memory` returned back, into the same buffers where they have the same shape."""
        memo: dict[int, Any] = {}
        for slot, value in memory:
            now = slot.table.get(slot.name)
            if slot.buffer and isinstance(now, Tensor) and _alike(now, value) and not now.is_inference():
                now.copy_(value)
            else:
                _put(slot, _copy(value, memo))

    def attributes(self) -> list[tuple[_Slot, Any]]:
        """Copies of the attributes, not of buffers, that passes in evaluation mode are known to change, as they are."""
        memo: dict[int, Any] = {}
        slots = [change.slot for change in self._known.get(False, []) if not change.slot.buffer]
        return [(slot, _copy(slot.table.get(slot.name, _Absent), memo)) for slot in slots]

    def put_back(self, kept: Sequence[tuple[_Slot, Any]]) -> None:
        """Write attributes back: those of `kept`, and as they were before the first pass those that showed later."""
        for slot, first, _ in self._known.get(False, []):
            if not slot.buffer:
                value = next((value for each, value in kept if each is slot), first)
                _put(slot, _copy(value, {}))


@contextmanager
def undone_if_it_fails(model: nn.Module) -> Iterator[None]:
    """If the block raises, undo what passes inside of it changed; otherwise that stays, for whoever watches outside."""
    memo: dict[int, Any] = {}
    before = [(slot, slot.table[slot.name], _copy(slot.table[slot.name], memo)) for slot in _slots(model)]
    for slot, _, copy in before:
        _put(slot, copy)
    failed = True
    try:
        yield
        failed = False
    finally:
        for slot, value, copy in before:
            now = slot.table.get(slot.name, _Absent)
            if failed or (_same(now, value) and not _written(now, copy)):
                _put(slot, value)


def _watched(model: nn.Module, found: list[_Change]) -> Iterator[None]:
    """Let passes change copies of everything that could change, and add what did to `found`."""
    memo: dict[int, Any] = {}
    built, own = _structure(model), list(_slots(model))
    before = [(slot, slot.table[slot.name], _copy(slot.table[slot.name], memo)) for slot in own]
    for slot, _, copy in before:
        _put(slot, copy)
    try:
        yield
    finally:
        known = {(id(slot.owner), slot.buffer, slot.name) for slot in own}
        new = [slot for slot in _slots(model) if (id(slot.owner), slot.buffer, slot.name) not in known]
        grown = _structure(model) != built  # layers and hooks that a model makes in its first pass stay, and its notes
        for slot, value, copy in [*before, *((slot, _Absent, _Absent) for slot in new)]:
            now = slot.table.get(slot.name, _Absent)
            same = _same(now, value) and not _written(now, copy)
            if same or not grown or slot.buffer:
                _put(slot, value)
            if not same and not grown:
                found.append(_Change(slot, _copy(value, {}), _alike(now, value)))


_CONTAINERS = (list, tuple, dict, OrderedDict, set, deque)
_OWN = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, children, hooks
_DEPTH = 2  # objects inside of objects that are looked into


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """All buffers and attributes of a model's modules, and the attributes of plain objects that these hold."""
    seen: set[int] = set()
    for module in model.modules():
        yield from (_Slot(module, True, name) for name in module._buffers)
        yield from _attributes(module, seen, 0)


def _attributes(owner: Any, seen: set[int], depth: int) -> Iterator[_Slot]:
    for name, value in list(vars(owner).items()):
        if depth == 0 and name in _OWN:
            continue
        yield _Slot(owner, False, name)
        if depth < _DEPTH and _is_plain_object(value) and id(value) not in seen:
            seen.add(id(value))
            yield from _attributes(value, seen, depth + 1)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a model's own, such as a cache, that passes may write attributes of."""
    if (
        isinstance(value, Tensor | nn.Module | type)
        or callable(value)
        or isinstance(getattr(value, "__dict__", 0), int)
    ):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins", "collections", "functools")


def _put(slot: _Slot, value: Any) -> None:
    """Write a value into its place, past `__setattr__`."""
    if value is _Absent:
        slot.table.pop(slot.name, None)
    else:
        slot.table[slot.name] = value


@torch.inference_mode(False)
def cloned(tensor: Tensor) -> Tensor:
    """A copy without a graph, which can be written outside of inference mode too."""
    return tensor.detach().clone()


@torch.inference_mode(False)
@torch.no_grad()
def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Tensors cloned, in containers too; parameters, modules and all other objects as they are."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copy: Any = cloned(value)
    elif type(value) in (dict, OrderedDict):
        copy = type(value)((key, _copy(item, memo)) for key, item in value.items())
    elif type(value) is deque:
        copy = deque((_copy(item, memo) for item in value), value.maxlen)
    elif type(value) in _CONTAINERS:
        copy = type(value)(_copy(item, memo) for item in value)
    else:
        return value
    memo[id(value)] = copy
    return copy


def _same(now: Any, was: Any) -> bool:
    """Whether a copy, or what stands in its place, still has the value of the original."""
    if now is was:
        return True
    if isinstance(now, Tensor) and isinstance(was, Tensor):
        return same_values(now, was)
    if type(now) is not type(was):
        return False
    if type(now) in (dict, OrderedDict):
        return list(now) == list(was) and all(_same(now[key], was[key]) for key in now)
    if type(now) is set:
        return bool(now == was)
    if type(now) in _CONTAINERS:
        return len(now) == len(was) and all(map(_same, now, was))
    return isinstance(now, bool | int | float | str | bytes) and now == was


def same_values(now: Tensor, was: Tensor) -> bool:
    """Whether two tensors have one shape, type and layout, and the same values; NaN is the same as NaN."""
    if (now.shape, now.dtype, now.layout) != (was.shape, was.dtype, was.layout):
        return False
    return all(torch.equal(a, b) or _same_but_nan(a, b) for a, b in zip(_dense(now), _dense(was), strict=True))


def _same_but_nan(now: Tensor, was: Tensor) -> bool:
    if now.shape != was.shape or not now.is_floating_point():
        return False
    return bool(((now == was) | ((now != now) & (was != was))).all())


def _dense(tensor: Tensor) -> list[Tensor]:
    """A tensor as dense ones: indices and values of a sparse one, which may be too large to be written out."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def _written(now: Any, copy: Any) -> bool:
    """Whether a pass wrote to a tensor, maybe the value that it had: another pass may write another value."""
    return isinstance(copy, Tensor) and not isinstance(copy, nn.Parameter) and (now is not copy or copy._version > 0)


def _alike(now: Any, was: Any) -> bool:
    """Whether two values have one type, and tensors one shape too."""
    if isinstance(now, Tensor) and isinstance(was, Tensor):
        return now.shape == was.shape and now.dtype == was.dtype
    if type(now) is type(was) and type(now) in (list, tuple, deque):
        return len(now) == len(was) and all(map(_alike, now, was))
    if type(now) is type(was) and type(now) in (dict, OrderedDict):
        return list(now) == list(was) and all(_alike(now[key], was[key]) for key in now)
    return type(now) is type(was)


def _structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which modules, parameters and hooks a model has, by name."""
    return [
        (id(m), *m._modules, *m._parameters, *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)
        for m in model.modules()
    ]
