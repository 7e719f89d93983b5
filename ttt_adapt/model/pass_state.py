"""What a model's own passes change in it, beside its parameters: kept out of passes that are not predictions.

Observers of quantisation-aware training and running averages change buffers, in evaluation mode too. Recurrent models
and models that shift features in time keep something of the frame before, in buffers or in plain attributes. Some
models count their calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ttt_adapt.model.slots import Absent, Slot, alike, copy_of, same_value, slots, structure, written
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

    @property
    def changes(self) -> list[Change]:
        """What a pass in evaluation mode was seen to change; empty before the first one."""
        return self._known.get(False, [])

    @property
    def changing(self) -> list[str]:
        """The names of these places."""
        return [change.slot.name for change in self.changes]

    def learn(self, changes: Iterable[Change]) -> None:
        """Add what else passes in evaluation mode change."""
        known = self._known.setdefault(False, [])
        keys = {change.slot.key for change in known}
        known += [change for change in changes if change.slot.key not in keys]

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
        memo: dict[int, Any] = {}
        before = [(change.slot, change.slot.value) for change in known]
        for (slot, first, steady), (_, now) in zip(known, before, strict=True):
            slot.put(copy_of(now if steady else first, memo))
        try:
            yield
        finally:
            for slot, value in before:
                slot.put(value)

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
