"""Places of a model where its passes may keep something beside its parameters, and copies of what is there.

A place is a buffer of a module, or an attribute of a module or of an object that a module holds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Absent:
    """Stands, as a class, for the value of a place that has none: a class stays itself in copies and pickles."""


class Slot(NamedTuple):
    """A place of a value.

    Attributes:
        owner: the module, or the object that a module holds.
        buffer: whether it is a buffer of a module, and not an attribute.
        name: of the value.
        path: dotted path from the model to the value.
    """

    owner: Any
    buffer: bool
    name: str
    path: str

    @property
    def key(self) -> tuple[int, bool, str]:
        """The same for all slots of one place."""
        return id(self.owner), self.buffer, self.name

    @property
    def table(self) -> dict[str, Any]:
        """Where the value is, under its name."""
        return self.owner._buffers if self.buffer else vars(self.owner)

    @property
    def value(self) -> Any:
        """What is there now; `Absent` where there is nothing."""
        return self.table.get(self.name, Absent)

    def put(self, value: Any) -> None:
        """Write a value, or with `Absent` none, past `__setattr__`."""
        if value is Absent:
            self.table.pop(self.name, None)
        else:
            self.table[self.name] = value


_CONTAINERS = (list, tuple, dict, OrderedDict, set, deque)
_OWN = frozenset(vars(nn.Module()))  # what every module has: parameters, buffers, children, hooks
_DEPTH = 2  # objects inside of objects that are looked into


def slots(model: nn.Module) -> Iterator[Slot]:
    """All buffers and attributes of a model's modules, and the attributes of plain objects that these hold."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        yield from (Slot(module, True, name, start + name) for name in module._buffers)
        yield from _attributes(module, start, seen, 0)


def _attributes(owner: Any, start: str, seen: set[int], depth: int) -> Iterator[Slot]:
    for name, value in list(vars(owner).items()):
        if depth == 0 and name in _OWN:
            continue
        yield Slot(owner, False, name, start + name)
        if depth < _DEPTH and is_plain_object(value) and id(value) not in seen:
            seen.add(id(value))
            yield from _attributes(value, f"{start}{name}.", seen, depth + 1)


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a model's own, such as a cache, that passes may write attributes of."""
    if (
        isinstance(value, Tensor | nn.Module | type)
        or callable(value)
        or isinstance(getattr(value, "__dict__", 0), int)
    ):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins", "collections", "functools")


def is_container(value: Any) -> bool:
    """Whether a value holds others, and is copied with them."""
    return type(value) in _CONTAINERS


def is_record(value: Any) -> bool:
    """Whether a value is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields") and hasattr(value, "_make")


@torch.inference_mode(False)
def cloned(tensor: Tensor) -> Tensor:
    """A copy without a graph, which can be written outside of inference mode too."""
    return tensor.detach().clone()


@torch.inference_mode(False)
@torch.no_grad()
def copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """Tensors and arrays cloned, in containers too; parameters, modules and all other objects as they are."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copy: Any = cloned(value)
    elif type(value) in (dict, OrderedDict):
        copy = type(value)((key, copy_of(item, memo)) for key, item in value.items())
    elif type(value) is deque:
        copy = deque((copy_of(item, memo) for item in value), value.maxlen)
    elif type(value) in _CONTAINERS:
        copy = type(value)(copy_of(item, memo) for item in value)
    elif is_record(value):
        copy = type(value)._make(copy_of(item, memo) for item in value)
    elif isinstance(value, np.ndarray):
        copy = value.copy()
    else:
        return value
    memo[id(value)] = copy
    return copy


def same_value(now: Any, was: Any) -> bool:
    """Whether a copy, or what stands in its place, still has the value of the original."""
    if now is was:
        return True
    if isinstance(now, Tensor) and isinstance(was, Tensor):
        return same_values(now, was)
    if type(now) is not type(was):
        return False
    if type(now) in (dict, OrderedDict):
        return list(now) == list(was) and all(same_value(now[key], was[key]) for key in now)
    if type(now) is set:
        return bool(now == was)
    if isinstance(now, list | tuple | deque):
        return len(now) == len(was) and all(map(same_value, now, was))
    if isinstance(now, np.ndarray | np.generic):
        return bool(now.shape == was.shape and now.dtype == was.dtype and np.array_equal(now, was))
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


def written(now: Any, copy: Any) -> bool:
    """Whether a pass wrote to a tensor, maybe the value that it had: another pass may write another value."""
    return isinstance(copy, Tensor) and not isinstance(copy, nn.Parameter) and (now is not copy or copy._version > 0)


def alike(now: Any, was: Any) -> bool:
    """Whether two values have one type, and tensors one shape too."""
    if isinstance(now, Tensor) and isinstance(was, Tensor):
        return now.shape == was.shape and now.dtype == was.dtype
    if type(now) is type(was) and type(now) in (list, tuple, deque):
        return len(now) == len(was) and all(map(alike, now, was))
    if type(now) is type(was) and type(now) in (dict, OrderedDict):
        return list(now) == list(was) and all(alike(now[key], was[key]) for key in now)
    return type(now) is type(was)


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which modules, parameters and hooks a model has, by name."""
    return [
        (id(m), *m._modules, *m._parameters, *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)
        for m in model.modules()
    ]
