"""Places of a model where its passes may keep something beside its parameters, and copies of what is there.

A place is a buffer of a module, or an attribute of a module or of an object that a module holds.
"""

from __future__ import annotations

import ast
import enum
import itertools
import sys
import types
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
    def derived(self) -> bool:
        """Whether it is the state of a random generator, which is another tensor each time that it is asked for."""
        return isinstance(self.owner, torch.Generator)

    @property
    def table(self) -> dict[str, Any] | None:
        """Where the value is, under its name; None for a generator, and where it is in one of `__slots__`."""
        if self.buffer:
            return self.owner._buffers
        return None if self.derived or self.name in _slotted(type(self.owner)) else vars(self.owner)

    @property
    def value(self) -> Any:
        """What is there now; `Absent` where there is nothing."""
        table = self.table
        if table is not None:
            return table.get(self.name, Absent)
        return self.owner.get_state() if self.derived else getattr(self.owner, self.name, Absent)

    def put(self, value: Any) -> None:
        """Write a value, or with `Absent` none, past `__setattr__`."""
        table = self.table
        if self.derived:
            self.owner.set_state(value)
        elif table is None:
            if value is not Absent:
                object.__setattr__(self.owner, self.name, value)
            elif hasattr(self.owner, self.name):
                object.__delattr__(self.owner, self.name)
        elif value is Absent:
            table.pop(self.name, None)
        else:
            table[self.name] = value


_CONTAINERS = (list, tuple, dict, OrderedDict, set, deque)
OWN = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers, children, hooks."""
_SEARCHED = 4096  # items of a container, up to which objects are searched in it


def slots(model: nn.Module) -> Iterator[Slot]:
    """All buffers and attributes of a model's modules, and those of all objects, modules and generators they hold."""
    modules = dict(model.named_modules())
    seen = {id(module) for module in modules.values()}
    for path, module in modules.items():
        yield from _own_slots(module, f"{path}." if path else "", seen)


def below(slot: Slot) -> Iterator[Slot]:
    """The places of all objects that the value of a place holds."""
    return _held(slot.value, slot.path, {id(slot.owner)})


def _own_slots(owner: Any, start: str, seen: set[int]) -> Iterator[Slot]:
    """The places of an object, and of those that it holds."""
    module = isinstance(owner, nn.Module)
    if module:
        yield from (Slot(owner, True, name, start + name) for name in owner._buffers)
    names = [name for name in getattr(owner, "__dict__", ()) if not (module and name in OWN)]
    for name in [*names, *_slotted(type(owner))]:
        slot = Slot(owner, False, name, start + name)
        yield slot
        yield from _held(slot.value, start + name, seen)


def _held(value: Any, path: str, seen: set[int]) -> Iterator[Slot]:
    """The places of a value that is an object of its own, or of such objects in containers."""
    if isinstance(value, str | int | float | Tensor) or value is None or id(value) in seen:
        return
    if isinstance(value, list | tuple | dict | set | deque):
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items) if len(value) <= _SEARCHED else ():
            yield from _held(item, f"{path}.{key}", seen)
    elif isinstance(value, torch.Generator):
        seen.add(id(value))
        yield Slot(value, False, "state", f"{path}.state")
    elif isinstance(value, nn.Module):  # one that is not registered
        for name, module in value.named_modules(prefix=path):
            if id(module) not in seen:
                seen.add(id(module))
                yield from _own_slots(module, f"{name}.", seen)
    elif is_plain_object(value):
        seen.add(id(value))
        yield from _own_slots(value, f"{path}.", seen)


_SLOTTED: dict[type, tuple[str, ...]] = {}  # class -> what `_slotted` found


def _slotted(kind: type) -> tuple[str, ...]:
    """The names of `__slots__` of a class and the classes that it extends."""
    if kind not in _SLOTTED:
        named = [vars(each).get("__slots__", ()) for each in kind.__mro__[:-1]]
        names = [n for some in named for n in ((some,) if isinstance(some, str) else some)]
        _SLOTTED[kind] = tuple(n for n in names if isinstance(getattr(kind, n, None), types.MemberDescriptorType))
    return _SLOTTED[kind]


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a model's own, such as a cache, that passes may write attributes of."""
    kind = type(value)
    if isinstance(value, Tensor | nn.Module | type | enum.Enum) or not (hasattr(value, "__dict__") or _slotted(kind)):
        return False
    return kind.__module__.partition(".")[0] not in _FOREIGN


_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "ttt_adapt"}) - {"__main__"}


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
    elif type(value) is itertools.count:
        copy = itertools.count(*count_of(value))
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
    if type(now) is itertools.count:
        return count_of(now) == count_of(was)
    return isinstance(now, bool | int | float | str | bytes) and now == was


def count_of(counter: itertools.count[Any]) -> tuple[Any, ...]:
    """The next value and the step of a counter, as it says them itself: no other way leaves it as it is."""
    found = ast.literal_eval(repr(counter).removeprefix("count"))
    return found if isinstance(found, tuple) else (found,)


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
