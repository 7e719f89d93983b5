"""A watch over all places of a model: a cheap look around every pass finds what changes only now and then.

One copy of every place is made at the start. A place that never changed still has the value of that copy, so a change
that comes late (a key frame every fifth pass) is undone from it. The look compares the identity of objects and the
number of writes to tensors that PyTorch counts, in loops that run in C. It copies nothing and never waits for the
device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt.model.slots import OWN, Slot, copy_of, is_container, is_record, same_value, slots, structure

_WRITES: Callable[[Tensor], int] = attrgetter("_version")
_LARGE = 1024  # items of a list, tuple, dict or set, of which only the last ones are looked at in every pass
_LAST = 8
_ARRAY = 65536  # bytes of an array of NumPy, up to which its values are looked at in every pass
_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_Key = tuple[int, bool, str]


class Seen(NamedTuple):
    """A place as it was seen: the object in it, a copy, what it consists of, and the writes to its tensors."""

    slot: Slot
    value: Any
    copy: Any
    parts: list[Any]
    writes: list[int]

    @classmethod
    def of(cls, slot: Slot, memo: dict[int, Any]) -> Seen:
        """A place as it is."""
        value = slot.value
        parts = list(_parts(value))
        return cls(slot, value, copy_of(value, memo), parts, [_writes(part) for part in parts])

    def changed(self, whole: bool) -> bool:
        """Whether the place was written, maybe with the value that it had: another pass may write another.

        Args:
            whole: compare the values of tensors too, which finds writes that PyTorch does not count; it may wait for
                the device.
        """
        now = self.slot.value
        if self.slot.derived or _hides(self.value):
            return not same_value(now, self.copy)
        parts = list(_parts(now))
        if len(parts) != len(self.parts) or not all(map(_stayed, parts, self.parts)):
            return True
        return [_writes(part) for part in parts] != self.writes or (whole and not same_value(now, self.copy))

    @property
    def identical(self) -> bool:
        """Whether the very same objects are there."""
        parts = list(_parts(self.slot.value))
        return len(parts) == len(self.parts) and all(map(is_, parts, self.parts))

    @property
    def original(self) -> Any:
        """The object that was there, where nobody wrote to it; else a copy with the values that it had."""
        if isinstance(self.value, Tensor) and _writes(self.value) == self.writes[0] != -1:
            return self.value
        return copy_of(self.copy, {})


class Watch:
    """Finds what passes change in places that they were not known to change.

    Args:
        model: the model.
        ignored: identities of tensors that somebody else looks after.
    """

    def __init__(self, model: nn.Module, ignored: Collection[int] = ()) -> None:
        self._model, self._ignored = model, ignored
        self._known: set[_Key] = set()
        self._seen: dict[_Key, Seen] = {}
        self._equal: set[_Key] = set()  # places where passes put equal values, in other objects
        self._views: list[Iterable[Any]] = []
        self._were: list[Any] = []
        self._tensors: list[Tensor] = []
        self._writes: list[int] = []
        self._compared: list[Seen] = []
        self._built: list[Any] = []
        self._take()

    def settle(self) -> None:
        """Before a pass: what somebody else changed since the last pass is no change of this one."""
        if not self._same():
            self._forget(each for each in self._seen.values() if each.changed(False))
            self._take()

    def found(self, whole: bool = False) -> tuple[list[Seen], list[Slot], bool]:
        """After a pass: what it changed.

        Args:
            whole: compare values too; see `Seen.changed`.

        Returns:
            Places that it changed, as they were before; places that it made; and whether it made layers, parameters or
            hooks, as some models do in their first pass.
        """
        if not whole and self._same():
            return [], [], False
        changed = [each for each in self._seen.values() if each.changed(whole)]
        if not changed:
            self._equal |= {each.slot.key for each in self._seen.values() if not each.identical}
        grown = structure(self._model) != self._built
        owners = {key[0] for key in self._seen} | {id(module) for module in self._model.modules()}
        new = [s for s in self._places() if s.key not in self._seen and s.key[0] in owners]
        if grown:
            self._forget(changed)
            self._take()
            return changed, [], True
        if not changed and not new:
            self._arrange()
        return changed, new, False

    def leave(self, known: Iterable[_Key]) -> None:
        """Look no more at places that passes are known to change."""
        self._known.update(known)
        self._take()

    def below(self, path: str) -> list[Seen]:
        """What is watched inside of the value of a place."""
        return [each for each in self._seen.values() if each.slot.path.startswith(path + ".")]

    # ---- how the look is laid out

    def _forget(self, seen: Iterable[Seen]) -> None:
        for each in list(seen):
            del self._seen[each.slot.key]

    def _places(self) -> list[Slot]:
        found = [s for s in slots(self._model) if s.key not in self._known and id(s.value) not in self._ignored]
        known = {s.path for s in slots(self._model) if s.key in self._known and not s.buffer}
        return [s for s in found if not any(s.path.startswith(path + ".") for path in known)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self) -> None:
        """Look at the model anew. Of what is watched already, the first copy stays."""
        memo: dict[int, Any] = {}
        self._seen = {slot.key: self._seen.get(slot.key) or Seen.of(slot, memo) for slot in self._places()}
        self._built = structure(self._model)
        self._arrange()

    def _arrange(self) -> None:
        by_owner: dict[tuple[int, bool], list[Seen]] = {}
        for each in self._seen.values():
            by_owner.setdefault(each.slot.key[:2], []).append(each)
        self._views, self._tensors, self._compared = [], [], []
        for group in by_owner.values():
            self._look_at(group)
        self._views += [m._modules.values() for m in self._model.modules() if m._modules]
        self._writes = [tensor._version for tensor in self._tensors]
        self._were = [*chain.from_iterable(self._views), _END]

    def _look_at(self, group: list[Seen]) -> None:
        """Lay out the look at the places of one owner."""
        slot, table = group[0].slot, group[0].slot.table
        parts = [part for each in group for part in each.parts if isinstance(part, Tensor)]
        self._tensors += [t for t in parts if _writes(t) != -1 and id(t) not in self._ignored]
        apart = [each for each in group if each.slot.key in self._equal or _hides(each.value)]
        self._compared += apart if table is not None else group
        if table is None or (not slot.buffer and _writes_nothing(slot.owner)):
            return
        steady = [each for each in group if each not in apart]
        known = {name for owner, buffer, name in self._known if (owner, buffer) == slot.key[:2]}
        without = known | (table.keys() - {each.slot.name for each in steady} - (set() if slot.buffer else OWN))
        self._views.append(_Rest(table, without) if without else table.values())
        self._views += [view for each in steady for view in _views(each.value)]

    def _same(self) -> bool:
        now = chain(chain.from_iterable(self._views), (_END,))
        return (
            all(map(is_, now, self._were))
            and list(map(_WRITES, self._tensors)) == self._writes
            and not any(each.changed(False) for each in self._compared)
        )


_END = object()


class _Rest:
    """The values of a table without some names."""

    def __init__(self, table: dict[str, Any], without: Iterable[str]) -> None:
        self._table, self._without = table, frozenset(without)

    def __iter__(self) -> Iterator[Any]:
        return iter([value for name, value in self._table.items() if name not in self._without])


class _Last:
    """The last items of a large container."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return islice(reversed(self._values), _LAST)


def _views(value: Any) -> Iterator[Iterable[Any]]:
    """What shows the items of a container, and of those inside of it, as they are."""
    if is_container(value):
        items = value.values() if isinstance(value, dict) else value
        if len(value) <= _LARGE:
            yield items
            for item in items:
                yield from _views(item)
        elif not isinstance(value, set):
            yield _Last(items)


def _parts(value: Any) -> Iterator[Any]:
    """What a value consists of: what is in containers, and how many items each has."""
    if not (is_container(value) or is_record(value)):
        yield value
        return
    yield type(value)
    yield len(value)
    items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)
    for item in items if len(items) <= _LARGE else items[-_LAST:]:
        yield from _parts(item)


def _stayed(now: Any, was: Any) -> bool:
    return now is was or (type(now) is type(was) and isinstance(now, _PLAIN) and bool(now == was or now != now))


def _writes(value: Any) -> int:
    """How often a tensor was written, as PyTorch counts it; not for parameters, and not in inference mode."""
    counted = isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference()
    return value._version if counted else -1


def _hides(value: Any) -> bool:
    """Whether a value can change while its identity and all that it consists of stay."""
    return isinstance(value, itertools.count) or (isinstance(value, np.ndarray) and value.nbytes <= _ARRAY)


def _writes_nothing(owner: Any) -> bool:
    """Whether an object is a layer of PyTorch's own, whose passes write buffers only, and without hooks that may."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return type(owner).__module__.startswith("torch.nn.") and not any(getattr(owner, name, None) for name in hooks)
