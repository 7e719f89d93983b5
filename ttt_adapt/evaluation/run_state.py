"""The state file of `ttt-adapt run`: what is written every so many frames, and how a run goes on from it.

A state is of the moment behind a frame: the stream has seen it, and all targets have it. So that nothing is lost or
twice, whatever moment a process is killed at, the order is: the state of frame 0, before anything else is written; then
frames; then the parts of films are closed, and the state follows. What is newer than the state is written again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.file_kind import RUN_STATE, refuse_other_kind
from ttt_adapt.files import check_format_number, check_place
from ttt_adapt.schema import check_fields, dict_of, flag, list_of, number, optional, plain, text, whole
from ttt_adapt.sharing.state_file import check_library, is_finite, read_state, write_state
from ttt_adapt.video import VideoReader
from ttt_adapt.video.film import uninterrupted
from ttt_adapt.view.terminal import counted, notice

FORMAT = 1
"""Version of what the file holds."""
EVERY = 500
"""Frames between two states."""
_SAMPLES = 64
"""Rows and columns of a frame that take part in the trace of a video, at least."""


@dataclass(frozen=True)
class FilmState:
    """A film at the moment of a state.

    Attributes:
        sizes: bytes of each part, or of the film where they were joined.
        joined: whether they were.
    """

    sizes: list[int]
    joined: bool = False


@dataclass(frozen=True)
class RunState:
    """A run at the end of a frame.

    Attributes:
        settings: what the run depends on, in plain values.
        frames: how many frames are done.
        trace: of the frames of a film so far, see `traced`; "" for live sources.
        source: name of a live source; "" of a film, which may be moved.
        size: (height, width) of the last frame.
        counts: what became of the source's frames, by name.
        rate: frames per second of the films.
        picture: (height, width) of the film.
        films: by the name of their argument.
        may_replace: whether a file at the place of a film may be replaced.
        runner: what `SavedRunner.state_dict` returned; None at frame 0.
    """

    settings: dict[str, Any]
    may_replace: bool
    frames: int = 0
    trace: str = ""
    source: str = ""
    size: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    rate: float | None = None
    picture: list[int] = field(default_factory=list)
    films: dict[str, FilmState] = field(default_factory=dict)
    runner: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it, as `write_state` takes it."""
        films = {name: {"sizes": film.sizes, "joined": film.joined} for name, film in self.films.items()}
        return {"format": FORMAT, **vars(self), "films": films}

    @classmethod
    def read(cls, path: Path) -> RunState:
        """What a run wrote.

        Raises:
            CheckpointError: the file is damaged, of another kind, or of a later version.
        """
        saved = read_state(path, RUN_STATE)
        check_format_number(saved.get("format"), FORMAT, path)
        check_fields(saved, _FIELDS, str(path))
        films = {name: FilmState(**film) for name, film in saved["films"].items()}
        return cls(**{name: value for name, value in saved.items() if name != "format"} | {"films": films})


def _is_film(value: Any) -> str:
    fits = isinstance(value, dict) and value.keys() == {"sizes", "joined"}
    return (list_of(whole())(value["sizes"]) or flag(value["joined"])) if fits else "sizes and joined"


def _any(_value: Any) -> str:
    return ""


_FIELDS = {
    "format": whole(1), "settings": dict_of(plain), "may_replace": flag, "frames": whole(), "trace": text,
    "source": text,
    "size": list_of(whole(1), most=2), "counts": dict_of(whole()), "rate": optional(number(0)),
    "picture": list_of(whole(1), most=2), "films": dict_of(_is_film), "runner": optional(_any),
}  # fmt: skip


def traced(trace: str, frame: np.ndarray) -> str:
    """The trace of a video that goes on with a frame: a hash of the trace so far and of some of the frame's pixels.

    Args:
        trace: of the frames before; "" at the beginning.
        frame: uint8 RGB [H, W, 3].
    """
    height, width = frame.shape[:2]
    pixels = frame[:: max(height // _SAMPLES, 1), :: max(width // _SAMPLES, 1)]
    return hashlib.sha256(trace.encode() + bytes(str(frame.shape), "ascii") + pixels.tobytes()).hexdigest()


class RunStates:
    """The state file of one run.

    Args:
        path: of the file; None: the run has none.
        every: frames between two states; None: 500.
        resume: go on from the file, if it is there.
        overwrite: an existing file may be replaced.

    Attributes:
        earlier: the state that the run goes on from; None: it begins.
        saved: frames of the last state; None: there is none yet.

    Raises:
        ConfigError: the arguments do not fit together, or the file may not be replaced.
        CheckpointError: the state cannot be read.
    """

    def __init__(self, path: Path | None, every: int | None, resume: bool, overwrite: bool) -> None:
        self.path, self._every, self._overwrite = path, EVERY if every is None else every, overwrite
        self._settings: dict[str, Any] = {}
        self._trace, self._whole, self._follows = "", True, False
        self.earlier = self._read(resume, every)
        self.saved = None if self.earlier is None else self.earlier.frames

    def _read(self, resume: bool, every: int | None) -> RunState | None:
        if self.path is None:
            if resume or every is not None:
                name = "resume" if resume else "state_every"
                raise ConfigError(f"{name} is set, and no state file is named: name one with `state`")
            return None
        if self._every < 1:
            raise ConfigError(f"state_every is {every}; expected a number of frames, at least 1")
        if resume and self._overwrite:
            raise ConfigError(
                "resume is set, and so is `overwrite`: the one goes on with what is there, the other begins anew; "
                "give one of them"
            )
        check_library()
        check_place(self.path, "state")
        if not os.path.lexists(self.path):
            return None
        if resume:
            return RunState.read(self.path)
        refuse_other_kind(self.path, (RUN_STATE.name, "safetensors", "empty"), "no state of a run", ConfigError)
        if not self._overwrite:
            raise ConfigError(
                f"state is {self.path}, which keeps the state of a run: set `resume` to go on with it, or `overwrite` "
                "to begin anew"
            )
        return None

    @property
    def kept(self) -> bool:
        """Whether the run keeps its state."""
        return self.path is not None

    @property
    def frames(self) -> int:
        """How many frames are done when the run begins."""
        return 0 if self.earlier is None else self.earlier.frames

    @property
    def may_replace(self) -> bool:
        """Whether files of earlier runs may be replaced."""
        return self._overwrite if self.earlier is None else self.earlier.may_replace

    def check(self, settings: Mapping[str, Any]) -> None:
        """Note what the run depends on, and refuse a state of another run.

        Args:
            settings: in plain values.

        Raises:
            CheckpointError: the state was saved with other ones.
        """
        self._settings = dict(settings)
        saved = {} if self.earlier is None else self.earlier.settings
        if self.earlier is None or saved == self._settings:
            return
        other = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        theirs, ours = ({name: values.get(name) for name in other} for values in (saved, settings))
        raise CheckpointError(
            f"{self.path} keeps the state of another run: it was saved with {theirs}, this run has {ours}. Give the "
            "same arguments, or set `overwrite` in the place of `resume` to begin anew"
        )

    @property
    def is_joined(self) -> bool:
        """Whether the films of the earlier run, if there is one, are complete."""
        return self.earlier is None or all(film.joined for film in self.earlier.films.values())

    # ---- the source

    def find(self, video: VideoReader, frames: Iterator[np.ndarray]) -> None:
        """Go to the frame of the state: frames of a film are read and dropped; other sources are where they are.

        Args:
            video: that is read.
            frames: its iteration.

        Raises:
            CheckpointError: these are not the frames that the state was saved after.
        """
        self._follows = self.kept and video.film
        if self.earlier is None or not self.earlier.frames:
            return
        if self._follows:
            for index in range(self.earlier.frames):
                if (frame := next(frames, None)) is None:
                    raise CheckpointError(
                        f"{video.name} has {counted(index, 'frame')}, and {self.path} is the state of frame "
                        f"{self.earlier.frames}: it is of another video"
                    )
                self._trace = traced(self._trace, frame)
        elif video.size != tuple(self.earlier.size):
            self._resized(video, self.earlier.size)
        if self._trace != self.earlier.trace or self.earlier.source != self._name(video):
            raise CheckpointError(
                f"{self.path} is of another video than {video.name}: "
                + (
                    f"the frames before its state, {self.earlier.frames}, were others"
                    if self._follows
                    else f"that of {self.earlier.source or 'a film'}"
                )
            )
        for name, count in self.earlier.counts.items():
            if not self._follows or name in ("adapted", "predicted"):  # the others were counted just now
                getattr(video.counts, name).go_on_from(count)
        notice(f"{video.name}: goes on behind {counted(self.earlier.frames, 'frame')}, with the state in {self.path}")

    def _resized(self, video: VideoReader, before: list[int]) -> None:
        (h, w), (height, width) = video.size, before
        sizes = f"{h} x {w} pixels high and wide, and the state in {self.path} is of {height} x {width}"
        if not video.any_size:
            raise CheckpointError(f"the frames of {video.name} are {sizes}: set `on_resize` to reset for a new video")
        notice(f"the frames of {video.name} are {sizes}; a new video begins")

    def _name(self, video: VideoReader) -> str:
        return "" if video.film else video.name

    @contextmanager
    def frame(self, frame: np.ndarray) -> Iterator[None]:
        """One frame, in which no signal interrupts a run that keeps its state; what raises in it leaves no state."""
        if not self.kept:
            yield
            return
        with uninterrupted():
            self._whole = False
            trace = traced(self._trace, frame) if self._follows else ""
            yield
            self._trace, self._whole = trace, True

    # ---- writing

    def due(self, frames: int) -> bool:
        """Whether the state of this moment is to be written: after so many frames, or at the end of the run."""
        return self.kept and frames % self._every == 0

    def is_whole(self, frames: int) -> bool:
        """Whether the run stands behind a frame that has no state yet."""
        return self.kept and self._whole and frames > (self.saved or 0)

    def begin(self) -> None:
        """Write the state of frame 0, unless the run goes on from one.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.kept and self.earlier is None:
            self._write(RunState(self._settings, self._overwrite))

    def save(self, frames: int, video: VideoReader, runner: dict[str, Any], outputs: Mapping[str, Any]) -> None:
        """Write the state behind a frame.

        A state with numbers that are not finite could not be loaded, and is not written: the one before stays.

        Args:
            frames: how many are done.
            video: the source.
            runner: its state.
            outputs: fields of `RunState` that tell of films.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not is_finite(runner):
            notice(f"no state is written at frame {frames}: the stream holds numbers that are not finite")
            return
        counts = {name: getattr(video.counts, name).count().frames for name in ("adapted", "predicted")}
        stats = video.stats
        counts |= {"taken": stats.taken.frames, "dropped": stats.dropped.frames}
        counts["read"] = counts["taken"] + counts["dropped"]  # what is read ahead is lost with the process
        at: dict[str, Any] = {
            "frames": frames,
            "trace": self._trace,
            "source": self._name(video),
            "size": list(video.size),
        }
        self._write(RunState(self._settings, self.may_replace, **at, counts=counts, runner=runner, **outputs))

    def change(self, **fields: Any) -> None:
        """Write the last state again, with other values of some fields.

        Raises:
            CheckpointError: it cannot be read or written.
        """
        assert self.path is not None
        self._write(replace(RunState.read(self.path), **fields))

    def _write(self, state: RunState) -> None:
        assert self.path is not None
        try:
            write_state(self.path, state.as_dict(), RUN_STATE)
        except OSError as error:
            raise CheckpointError(f"the state {self.path} cannot be written: {error}") from error
        self.saved = state.frames
