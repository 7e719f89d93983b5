"""The streams that clients opened, over one checkpoint. All but `stats` and `names` run in the worker's thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.errors import FrameError, TTTAdaptError
from ttt_adapt.evaluation.watching import normalizer
from ttt_adapt.serve.answers import Form, encoded
from ttt_adapt.serve.limits import Limits, Rate
from ttt_adapt.serve.metrics import Metrics
from ttt_adapt.serve.refusal import Refusal
from ttt_adapt.serve.sources import SourceReader
from ttt_adapt.serve.states import load_stream, save_stream
from ttt_adapt.sharing.stream import Stream
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.video.pictures import decode_picture

Size = tuple[int, int] | Literal["native"] | None
KINDS = ("JPEG", "PNG")
LONGEST = 8
"""How many times as long as the other one a side may be: at the height of the model a strip would be far too wide."""


@dataclass(eq=False)
class Served:
    """One open stream.

    Attributes:
        stream: the handle.
        rate: of its frames.
        counts: its frames, by what became of them.
        skipped: frames without an update, by the reason.
        ms: that its last frame took.
        source: what the server reads for it; None: clients post its frames.
        latest: the model's output for the last frame of a source, and the frame.
    """

    stream: Stream
    rate: Rate
    counts: dict[str, int] = field(default_factory=lambda: {"adapted": 0, "skipped": 0, "predicted": 0, "refused": 0})
    skipped: dict[str, int] = field(default_factory=dict)
    ms: float | None = None
    source: SourceReader | None = None
    latest: tuple[Tensor, np.ndarray] | None = None

    @property
    def name(self) -> str:
        """Of the stream."""
        return self.stream.name

    @property
    def stats(self) -> dict[str, Any]:
        """Its counters, in plain values."""
        source = None if self.source is None else self.source.stats
        return {
            "name": self.name,
            "frames": {**self.counts},
            "skipped": {**self.skipped},
            "ms": self.ms,
            "source": source,
        }


class Prediction(NamedTuple):
    """What a client gets for a frame.

    Attributes:
        content: as `encoded` made it.
        frame: index of the frame in its stream; None where it did not enter the stream.
        adapted: whether the weights were updated.
        reason: why not; "" if they were, or were not to be.
    """

    content: bytes
    frame: int | None
    adapted: bool
    reason: str


class ServedStreams:
    """Opens, steps and closes streams by their names.

    Args:
        checkpoint: the model.
        adapter: over it.
        size: (H, W) at which the model sees frames; "native": their own; None: the training height, and the frame's
            aspect.
        limits: what clients may ask for.
        metrics: counts.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: StreamAdapter, size: Size, limits: Limits, metrics: Metrics
    ) -> None:
        self._checkpoint, self._adapter, self._size = checkpoint, adapter, size
        self._limits, self._metrics = limits, metrics
        self._open: dict[str, Served] = {}

    @property
    def names(self) -> list[str]:
        """Names of the streams that are open."""
        return list(self._open)

    def find(self, name: str) -> Served:
        """The stream of that name.

        Raises:
            Refusal: there is none.
        """
        served = self._open.get(name)
        if served is None:
            raise Refusal(404, "no_stream", f"there is no stream {name!r}: open it with POST /v1/streams")
        return served

    def open(self, name: str) -> Served:
        """A new stream at its beginning.

        Raises:
            Refusal: the name is taken, or as many streams are open as may be.
        """
        if name in self._open:
            raise Refusal(409, "stream_is_open", f"a stream {name!r} is open: use it, close it, or take another name")
        if len(self._open) >= self._limits.streams:
            raise Refusal(
                429, "too_many_streams",
                f"{len(self._open)} streams are open, as many as may be: close one first", retry_after=60,
            )  # fmt: skip
        served = Served(self._adapter.open_stream(name), Rate(self._limits.rate))
        self._metrics.begin(name)
        self._open[name] = served
        return served

    def close(self, name: str) -> None:
        """Let go of a stream."""
        served = self.find(name)
        if served.source is not None:
            served.source.stop()
        del self._open[name]
        self._metrics.forget(name)
        served.stream.close()

    def post(self, name: str, picture: bytes, form: Form, adapt: bool) -> Prediction:
        """Take a picture that a client posted, and predict it.

        Args:
            name: of the stream.
            picture: JPEG or PNG.
            form: of the answer.
            adapt: whether the frame enters the stream; otherwise it is predicted only.

        Raises:
            Refusal: there is no such stream, or the server reads its frames itself.
            DataError, FrameError: the picture cannot be used; nothing has changed.
        """
        served = self.find(name)
        if served.source is not None and served.source.active:
            raise Refusal(409, "has_source", f"stream {name!r} has a source, which gives its frames: stop it first")
        with _Counted(self._metrics, served):
            frame = decode_picture(picture, KINDS, self._limits.frame_pixels)
            output, seen = self._step(served, frame, adapt)
        report = served.stream.last if adapt else None
        content = encoded(form, self._checkpoint.task, output, seen)
        if report is None:
            return Prediction(content, None, False, "")
        return Prediction(content, report.frame_index, report.adapted, report.reason)

    def take(self, served: Served, frame: np.ndarray, begins: bool) -> None:
        """Take a frame of a source; errors as for `post`.

        Args:
            served: its stream.
            frame: uint8 RGB [H, W, 3].
            begins: whether a new video begins with it.
        """
        if self._open.get(served.name) is not served:
            raise Refusal(404, "no_stream", "the stream of this source was closed")
        if begins:
            served.stream.reset()
        with _Counted(self._metrics, served):
            output, seen = self._step(served, frame, adapt=True)
        served.latest = output.detach().clone(), seen

    def latest(self, name: str, form: Form) -> bytes:
        """The prediction for the last frame of the source of a stream.

        Raises:
            Refusal: there is none.
        """
        latest = self.find(name).latest
        if latest is None:
            raise Refusal(409, "no_prediction", f"stream {name!r} has no source, or no frame of it came so far")
        return encoded(form, self._checkpoint.task, *latest)

    def reset(self, name: str) -> Served:
        """Begin a new video."""
        served = self.find(name)
        served.stream.reset()
        served.latest = None
        return served

    def save(self, name: str, path: Path) -> None:
        """Write the state of a stream; see `save_stream`."""
        save_stream(self.find(name).stream, path)

    def load(self, name: str, path: Path) -> Served:
        """Go on from a saved state; see `load_stream`."""
        served = self.find(name)
        load_stream(served.stream, path)
        return served

    def watch(self, name: str, reader: Callable[[Served], SourceReader]) -> Served:
        """Let the server read the frames of a stream.

        Raises:
            Refusal: it does so already.
        """
        served = self.find(name)
        if served.source is not None and served.source.active:
            raise Refusal(409, "has_source", f"stream {name!r} has a source: stop it first")
        served.source = reader(served)
        return served

    def unwatch(self, name: str) -> Served:
        """Stop the source of a stream, if it has one."""
        served = self.find(name)
        if served.source is not None:
            served.source.stop()
        return served

    def stop_sources(self) -> None:
        """Stop all sources; does not wait. From any thread."""
        for served in list(self._open.values()):
            if served.source is not None:
                served.source.stop()

    def _step(self, served: Served, frame: np.ndarray, adapt: bool) -> tuple[Tensor, np.ndarray]:
        """The model's output for a frame, and the frame as the model was shown it."""
        started = time.perf_counter()
        seen = self._checkpoint.task.see(frame)
        x: Any = seen
        if max(seen.shape[:2]) > LONGEST * min(seen.shape[:2]):
            raise FrameError(
                f"the frame is {seen.shape[0]} x {seen.shape[1]} (H x W); expected a picture of a camera, no side "
                f"{LONGEST} times as long as the other"
            )
        if self._size != "native":
            x = normalizer(self._checkpoint, self._size, seen.shape[:2])(seen)
        output = served.stream.step(x) if adapt else served.stream.predict(x)
        result, last = "predicted", served.stream.last
        if adapt and last is not None:
            result = "adapted" if last.adapted else "skipped"
            if not last.adapted:
                served.skipped[last.reason] = served.skipped.get(last.reason, 0) + 1
        seconds = time.perf_counter() - started
        served.ms = 1e3 * seconds
        served.counts[result] += 1
        self._metrics.frame(served.name, result, seconds)
        return output, seen


class _Counted:
    """Counts a frame whose block raises as refused."""

    def __init__(self, metrics: Metrics, served: Served) -> None:
        self._metrics, self._served = metrics, served

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TTTAdaptError):
            self._served.counts["refused"] += 1
            self._metrics.frame(self._served.name, "refused")
