"""What a model's own passes keep of one video, as a part of its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ttt_adapt.model.model_memory import ModelMemory, Values
from ttt_adapt.stream.state_part import Part, nothing


class PassMemory(Part):
    """A recurrent state, features of the frame before, a count: what predictions change in the model itself.

    Of several videos over one model, the memory of one is in the model. That of the others is in copies.

    Args:
        memory: of the model.
    """

    def __init__(self, memory: ModelMemory) -> None:
        self._memory = memory
        self._kept: Values | None = None  # where this video is not in the model

    @property
    def inside(self) -> bool:
        """Whether the memory is in the model."""
        return self._kept is None

    def place(self) -> Callable[[], None]:
        """Remember whether the memory is in the model; returns a function that brings it back to where it is now."""
        kept = self._kept
        return self.enter if kept is None else lambda: self._keep(kept)

    def _keep(self, values: Values) -> None:
        self._kept = values

    def leave(self) -> None:
        """Move the memory out of the model, into copies."""
        if self._kept is None:
            self._kept = self._memory.values()

    def enter(self) -> None:
        """Move the memory into the model."""
        if self._kept is not None:
            self._memory.write(self._kept)
            self._kept = None

    def reset(self) -> None:
        """Go back to the memory with which the stream began."""
        if self._kept is None:
            self._memory.start.put_back()
        else:
            self._kept = []

    def state_dict(self) -> dict[str, Any]:
        """A copy of it, in tensors and plain values; empty for a model that keeps nothing.

        Raises:
            StateError: the model keeps other objects.
        """
        return self._memory.packed(self._memory.values() if self._kept is None else self._kept)

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        noted = self._memory.unpack(saved)

        def load() -> None:
            values = noted()
            if self._kept is None:
                self._memory.write(values)
            else:
                self._kept = values

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`; a prediction that fails puts back what it changed (`ModelMemory.predicting`)."""
        return nothing
