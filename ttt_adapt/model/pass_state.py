"""What a model's own passes change in it, beside its parameters: kept out of passes that are not predictions.

Observers of quantisation-aware training and running averages change buffers, in evaluation mode too. Recurrent models
and models that shift features in time keep something of the frame before, in buffers or in plain attributes. Some
models count their calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ttt_adapt.model.slots import Absent, Slot, alike, below, copy_of, same_value, slots, structure, written
from ttt_adapt.model.watch import Watch
from ttt_adapt.model.wrappers import unwrapped


class Change(NamedTuple):
    """A place that passes change.

    Attributes:
        slot: which.
        first: a copy of its value before the first pass; `Absent` where there was none.
        steady: whether it keeps type and shape in a pass.
    """

    slot: Slot
    first: Any
    steady: bool


class PassState:
    """Buffers and plain attributes of a model that its passes change.

    The first pass that runs inside of `kept`, in each mode of the model, shows which ones these are, and `learn` adds
    others. Later passes cost nothing where there are none.

    Attributes:
        model: the model, inside of wrappers such as that of `torch.compile`.

    Args:
        model: the model, or a wrapper around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self._known: dict[bool, list[Change]] = {}
        self._ignored: dict[int, Any] = {}
        self._watch: Watch | None = None
        self._inside = False  # whether a block of `kept` is open

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches its own model."""
        return {**vars(self), "_watch": None, "_ignored": {}, "_inside": False}

    @property
    def watch(self) -> Watch:
        """What finds changes in other places; made when it is first asked for."""
        if self._watch is None:
            with torch.inference_mode(False):
                self._watch = Watch(self.model, self._ignored.keys())
                self._watch.leave(change.slot.key for change in self.changes)
        return self._watch

    def ignore(self, tensors: Iterable[Any]) -> None:
        """Leave tensors to somebody else who looks after them."""
        self._ignored |= {id(tensor): tensor for tensor in tensors}
        self._watch = None

    @property
    def changes(self) -> list[Change]:
        """What a pass in evaluation mode was seen to change; empty before the first one."""
        return self._known.get(False, [])

    def places(self, training: bool = False) -> list[Change]:
        """What passes are known to change, as it is now: also in objects that the model put there since."""
        known = self._known.get(training, [])
        paths = [change.slot.path + "." for change in known if not change.slot.buffer]
        inside = [any(change.slot.path.startswith(path) for path in paths) for change in known]
        there = [change for change, within in zip(known, inside, strict=True) if not within]
        firsts = {change.slot.key: change for change in known}
        found = {change.slot.key: change for change in there}
        for change in there:
            for slot in below(change.slot):
                found.setdefault(slot.key, firsts.get(slot.key) or Change(slot, copy_of(slot.value, {}), True))
        return list(found.values())

    @property
    def changing(self) -> list[str]:
        """The names of these places."""
        return [change.slot.name for change in self.changes]

    def learn(self, changes: Iterable[Change], training: bool = False) -> None:
        """Add what else passes change, in evaluation mode or in training mode."""
        known = self._known.setdefault(training, [])
        keys = {change.slot.key for change in known}
        new = [change for change in changes if change.slot.key not in keys]
        if new and self._watch is not None and not training:
            inside = [seen for change in new for seen in self._watch.below(change.slot.path)]
            new += [Change(seen.slot, seen.copy, True) for seen in inside]
        known += {change.slot.key: change for change in reversed(new)}.values()
        if new and self._watch is not None and not training:
            self._watch.leave(change.slot.key for change in new)

    def look(self, stays: bool, whole: bool = False, training: bool = False) -> None:
        """After a pass: learn what else it changed, and put that back unless it stays.

        Args:
            stays: whether it stays.
            whole: compare all values; see `Watch.found`.
            training: the mode of the model in the pass.
        """
        changed, new, grown = self.watch.found(whole)
        steady = [alike(seen.slot.value, seen.copy) for seen in changed]
        if not stays:
            for seen in changed:
                if not grown or seen.slot.buffer:
                    seen.slot.put(seen.original)
            for slot in new:
                slot.put(Absent)
        if not grown and (changed or new):
            found = [Change(seen.slot, seen.copy, same) for seen, same in zip(changed, steady, strict=True)]
            self.learn([*found, *(Change(slot, Absent, False) for slot in new)], training)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block, passes change copies; afterwards the model has its own values again, in the same objects.

        A value that takes another type or shape in a pass, such as a memory of the frame before, begins each block as
        it was before the first pass. Other values begin as they are.
        """
        training = self.model.training
        known = self._known.get(training)
        if known is None:
            found: list[Change] = []
            yield from _watched(self.model, found)
            self._known[training] = found
            return
        outermost = not self._inside
        if outermost:  # what is switched around an inner block is no change of a pass
            self.watch.settle()
        memo: dict[int, Any] = {}
        places = self.places(training)
        before = [(change.slot, change.slot.value) for change in places]
        for (slot, first, steady), (_, now) in zip(places, before, strict=True):
            slot.put(copy_of(now if steady else first, memo))
        self._inside = True
        try:
            yield
        finally:
            for slot, value in before:
                slot.put(value)
            if outermost:
                self._inside = False
                self.look(stays=False, training=training)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """As `kept`, around a part of a pass: it does not show all that a whole one changes."""
        if self.model.training in self._known:
            with self.kept():
                yield
        else:
            yield from _watched(self.model, [])


@contextmanager
def undone_if_it_fails(model: nn.Module) -> Iterator[None]:
    """If the block raises, undo what passes inside of it changed; otherwise that stays, for whoever watches outside."""
    memo: dict[int, Any] = {}
    before = [(slot, slot.value, copy_of(slot.value, memo)) for slot in slots(model)]
    for slot, _, copy in before:
        slot.put(copy)
    failed = True
    try:
        yield
        failed = False
    finally:
        for slot, value, copy in before:
            now = slot.value
            if failed or (same_value(now, value) and not written(now, copy)):
                slot.put(value)


def _watched(model: nn.Module, found: list[Change]) -> Iterator[None]:
    """Let passes change copies of everything that could change, and add what did to `found`."""
    memo: dict[int, Any] = {}
    built, own = structure(model), list(slots(model))
    before = [(slot, slot.value, copy_of(slot.value, memo)) for slot in own]
    for slot, _, copy in before:
        slot.put(copy)
    try:
        yield
    finally:
        known = {slot.key for slot in own}
        new = [slot for slot in slots(model) if slot.key not in known]
        grown = structure(model) != built  # layers and hooks that a model makes in its first pass stay, and its notes
        for slot, value, copy in [*before, *((slot, Absent, Absent) for slot in new)]:
            now = slot.value
            same = same_value(now, value) and not written(now, copy)
            if same or not grown or slot.buffer:
                slot.put(value)
            if not same and not grown:
                found.append(Change(slot, copy_of(value, {}), alike(now, value)))
