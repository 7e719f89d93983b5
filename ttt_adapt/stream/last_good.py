"""LastGood: a video as it was when all was well, to go back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ttt_adapt.errors import CheckpointError, StateError
from ttt_adapt.schema import shown
from ttt_adapt.stream.source import copied
from ttt_adapt.stream.state_part import Part


class LastGood(Part):
    """A copy of some parts of a video: weights and statistics, optimizer, random state, ...

    Making one copies tensors where they are, and waits for nothing.

    Args:
        parts: name -> what belongs together.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._kept: dict[str, Any] | None = None

    @property
    def there(self) -> bool:
        """Whether there is a copy."""
        return self._kept is not None

    def keep(self) -> None:
        """Copy all parts as they are now; there is no copy without the memory for it, or where one cannot be saved."""
        self._kept = None  # first: its memory is needed
        try:
            self._kept = {name: part.state_dict() for name, part in self._parts.items()}
        except (torch.OutOfMemoryError, MemoryError, StateError):
            self.reset()

    def restore(self) -> bool:
        """Bring all parts back together; False, and nothing has changed, where there is no copy that could be."""
        if self._kept is None:
            return False
        try:
            takers = [self._parts[name].prepare_load(kept) for name, kept in self._kept.items()]
        except CheckpointError:  # the copy holds values that are not finite
            self.reset()
            return False
        for take in takers:
            take()
        return True

    def reset(self) -> None:
        """Let go of the copy."""
        self._kept = None

    def free(self) -> None:
        """See `Part`."""
        self.reset()

    def state_dict(self) -> dict[str, Any] | None:
        """A copy of the copy; None where there is none."""
        return copied(self._kept)

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        if saved is not None and (not isinstance(saved, Mapping) or saved.keys() != self._parts.keys()):
            raise CheckpointError(
                f"the state's last good state is {shown(saved)}; expected None, or a dict with {', '.join(self._parts)}"
            )
        kept = None if saved is None else dict(saved)
        for name, part in self._parts.items():
            if kept is not None:
                part.prepare_load(kept[name])

        def load() -> None:
            self._kept = copied(kept)

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        kept = self._kept

        def undo() -> None:
            self._kept = kept

        return undo
