"""Parking: idle videos wait in the memory of the CPU or in files, and come back bit for bit."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError, ConfigError, StateError
from ttt_adapt.sharing.state_file import check_library, is_finite, read_state, write_state
from ttt_adapt.stream.state import StreamState

Fetch = Callable[[], dict[str, Any]]


class Parking:
    """Keeps at most so many videos on the device. The one that was idle the longest leaves first.

    Args:
        resident: how many of the videos that were admitted stay on the device; None: all.
        place: "cpu", or a folder.

    Raises:
        ConfigError: `resident` is no number from 1 on, the folder cannot be written, or files cannot be written without
            a package that is missing.
    """

    def __init__(self, resident: int | None = None, place: str | Path = "cpu") -> None:
        if resident is not None and (not isinstance(resident, int) or isinstance(resident, bool) or resident < 1):
            raise ConfigError(f"resident is {resident!r}; expected a whole number of streams, at least 1, or None")
        self._resident, self._folder = resident, None if place == "cpu" else _own_folder(place)
        self._here: OrderedDict[StreamState, None] = OrderedDict()  # the one that was used last is at the end
        self._away: dict[StreamState, Fetch | None] = {}  # None: a video at its beginning, of which nothing is kept
        self._files = 0
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def holds(self, state: StreamState) -> bool:
        """Whether a video is parked."""
        return self._away.get(state) is not None

    def admit(self, state: StreamState) -> None:
        """Take a new video in. At its beginning it needs no memory."""
        self._away[state] = None

    def fetch(self, state: StreamState) -> None:
        """Bring a video back to the device; nothing happens where it is there, or was never admitted.

        Raises:
            CheckpointError: its file is gone or damaged.
        """
        if state in self._away:
            fetch = self._away[state]
            if fetch is not None:
                state.take_back(fetch())
            del self._away[state]
            self._here[state] = None

    def make_room(self, state: StreamState) -> None:
        """Note that a video is in use, and park those that are too many.

        Raises:
            StateError: a file cannot be written; no video has changed.
        """
        if state in self._here:
            self._here.move_to_end(state)
        if self._resident is None:
            return
        for idle in list(self._here)[: -self._resident]:
            self._park(idle)

    def forget(self, state: StreamState) -> None:
        """Let go of a video that was closed."""
        self._here.pop(state, None)
        self._away.pop(state, None)

    @torch.inference_mode(False)
    def _park(self, state: StreamState) -> None:
        """Move a video away from the device. One that would not come back as it is stays."""
        try:
            saved = state.state_dict()
        except StateError:  # the model keeps something of this video that cannot be saved
            return
        if not is_finite(saved):  # a load would refuse it
            return
        self._away[state] = self._stored(saved)
        del self._here[state]
        state.free()

    def _stored(self, saved: dict[str, Any]) -> Fetch:
        """Keep a state where it belongs; returns what brings it back."""
        if self._folder is None:
            kept = _on_cpu(saved)
            return lambda: kept
        self._files += 1
        file = self._folder / f"{self._files}.safetensors"
        try:
            write_state(file, saved, lasting=False)
        except OSError as error:
            raise StateError(
                f'an idle stream cannot be parked in {file.parent} ({error}): make room there, or use park="cpu"'
            ) from error
        return _File(file)


class _File:
    """A state in a file, which is removed when nobody needs it any more.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __call__(self) -> dict[str, Any]:
        """The state.

        Raises:
            CheckpointError: the file is gone or damaged.
        """
        try:
            return read_state(self._path)
        except CheckpointError as error:
            raise CheckpointError(f"a parked stream cannot be read ({error}): close() it, and open another") from error


def _own_folder(place: str | Path) -> Path:
    """A new folder inside of the one that was named."""
    check_library()
    try:
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="parked-", dir=folder))
    except (OSError, TypeError) as error:
        raise ConfigError(f'park is {place!r}; expected "cpu", or a folder that can be written ({error})') from error


def _on_cpu(value: Any) -> Any:
    """A nested state with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.to(torch.device("cpu"))
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
