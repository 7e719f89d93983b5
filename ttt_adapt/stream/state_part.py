"""`Part`: what `StreamState` is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any


class Part(ABC):
    """One thing that belongs to one video: it can be reset, saved, loaded, and put back after a failed step."""

    @abstractmethod
    def reset(self) -> None:
        """Begin a new video."""

    @abstractmethod
    def state_dict(self) -> Any:
        """A copy of it, in tensors and plain values."""

    @abstractmethod
    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """Check what `state_dict` returned, and change nothing.

        Returns:
            A function that takes the saved values over. It does not fail.

        Raises:
            CheckpointError: the saved values do not fit.
        """

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """Remember how it is now.

        Returns:
            A function that brings it back to this point, after a step that failed.
        """

    def free(self) -> None:
        """Let go of the memory on the device: somebody keeps a `state_dict`, and loads it before the video goes on."""
        return  # most parts have no memory there

    def load_state_dict(self, saved: Any) -> None:
        """Take over what `state_dict` returned, all or nothing; errors as in `prepare_load`."""
        self.prepare_load(saved)()


def nothing() -> None:
    """For a part that stays as it is after a failed step."""
