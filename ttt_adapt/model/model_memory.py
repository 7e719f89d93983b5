"""What a model keeps of the video that it predicts: found by looking at its predictions, put back, moved, saved.

A recurrent model keeps a state, one that shifts features in time keeps those of the frame before, some count their
calls. This belongs to the video, as the window does. For a model that keeps nothing, a frame costs two looks (`watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttt_adapt.errors import StateError
from ttt_adapt.model.memory_file import pack_memory, unpack_memory
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.model.pass_state import Change, PassState
from ttt_adapt.model.slots import Slot, alike, copy_of
from ttt_adapt.model.start_state import StartState, rewritten
from ttt_adapt.model.wrappers import unwrapped

LOOKS = 2
"""How many predictions are compared by value too: writes that PyTorch does not count show there."""

Values = Sequence[tuple[Slot, Any]]
"""What a model keeps of a video: places, and copies of what is there."""


class _Before(NamedTuple):
    """A place before a pass, the object in it, and a copy."""

    slot: Slot
    value: Any
    copy: Any

    def put_back(self) -> None:
        """Make the place what it was, in the same object where that is a tensor that can be written."""
        if isinstance(self.value, Tensor) and not isinstance(self.value, nn.Parameter):
            self.slot.put(_written(self.value, self.copy))
        else:
            self.slot.put(copy_of(self.copy, {}))


class ModelMemory:
    """The memory of a model in the hands of one adapter.

    Attributes:
        start: the memory and all buffers as they were when the stream began.

    Args:
        model: the model, or a wrapper around it: what is predicted with.
        passes: what its passes are known to change, or those of a part of it.
        adapted: tensors that somebody else looks after.
    """

    def __init__(self, model: nn.Module, passes: PassState, adapted: Collection[Tensor] = ()) -> None:
        inside = unwrapped(model)
        self._passes = passes if passes.model is inside else PassState(inside)
        self._adapted = {id(tensor): tensor for tensor in adapted}
        # running statistics are looked after by `norms`; a replayed pass counts as a write to them
        statistics = [buffer for norm in norm_layers(self._passes.model) for buffer in norm.buffers()]
        self._passes.ignore([*adapted, *statistics])
        self._looks = {True: LOOKS, False: LOOKS}
        self.start = StartState(model, self._passes, adapted)

    @property
    def changes(self) -> bool:
        """Whether predictions are known to change anything."""
        return bool(self._passes.changes)

    @contextmanager
    def predicting(self, stays: bool = True) -> Iterator[None]:
        """Around a whole pass over a frame. What it changes is put back where it fails.

        Args:
            stays: whether what it changes stays otherwise; False: it is no prediction of the video.
        """
        done, whole = False, self._looks[stays] > 0
        self._looks[stays] -= whole
        with torch.inference_mode(False):
            self._passes.watch.settle()
            before = self._before()
        try:
            yield
            done = True
        finally:
            self._after(before, whole, done and stays)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _after(self, before: list[_Before], whole: bool, stays: bool) -> None:
        """Put back what a pass changed, unless it stays, and learn what else it changed."""
        if not stays:
            for each in before:
                each.put_back()
        self._passes.look(stays, whole)

    def _before(self) -> list[_Before]:
        memo: dict[int, Any] = {}
        pairs = ((change.slot, change.slot.value) for change in self._passes.places())
        return [_Before(s, v, copy_of(v, memo)) for s, v in pairs if id(v) not in self._adapted]

    def values(self) -> Values:
        """Copies of all that predictions are known to change, as it is."""
        memo: dict[int, Any] = {}
        return [(change.slot, copy_of(change.slot.value, memo)) for change in self._passes.places()]

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(self, values: Values) -> None:
        """Write what `values` returned back; all else is as it was when the stream began."""
        if not (values or self.changes):
            return
        self.start.put_back()
        memo: dict[int, Any] = {}
        for slot, value in values:
            now = slot.value
            if slot.buffer and isinstance(now, Tensor) and isinstance(value, Tensor) and alike(now, value):
                slot.put(_written(now, value))
            else:
                slot.put(copy_of(value, memo))

    def packed(self, values: Values) -> dict[str, Any]:
        """`values` as tensors and plain values.

        Raises:
            StateError: some of it consists of other objects.
        """
        try:
            return pack_memory(values, self._home)
        except TypeError as error:
            raise StateError(
                f"the model keeps something of the video that cannot be saved ({error}): let it keep tensors, numbers, "
                "text, or lists, tuples, dicts and sets of these, in buffers or attributes of its modules"
            ) from error

    def unpack(self, saved: Any) -> Callable[[], Values]:
        """Check what `packed` returned, and change nothing.

        Returns:
            A function that returns it as `values` does, and notes that passes change these places.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        values = unpack_memory(saved, self._passes.model, self._home)

        def note() -> Values:
            now = [(slot, slot.value, value) for slot, value in values]
            self._passes.learn([Change(slot, copy_of(was, {}), alike(was, value)) for slot, was, value in now])
            return values

        return note

    @property
    def _home(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self._passes.model.parameters()), torch.device("cpu"))


def _written(tensor: Tensor, values: Tensor) -> Tensor:
    """The tensor with these values; a copy of them where it cannot be written. The host does not wait."""
    if tensor.is_inference() or (tensor.shape, tensor.dtype, tensor.layout) != (
        values.shape,
        values.dtype,
        values.layout,
    ):
        return rewritten(tensor, values)
    return tensor.copy_(values)
