"""A film that plays while it is being written: the encoder behind `VideoWriter` and `LabelVideoWriter`.

An ordinary mp4 has its index at the end, and a process that is killed never writes it. This film waits for no end:
every frame is a fragment of its own (of Matroska: a cluster), which is on disk as soon as the encoder has made it. The
encoder looks one frame ahead and has no B-frames: a killed process loses three or four frames. `finish_film` makes an
ordinary file of the fragments once all frames are there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ttt_adapt.files import atomic_write
from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
BT709 = 1  # the number of ITU-R BT.709 in every table of ITU-T H.273
LIMITED_RANGE = 1
PROMPT = "rc-lookahead=1:sync-lookahead=0:bframes=0:sliced-threads=1"
"""Parameters of x264 by which a frame leaves the encoder soon after it came. Files are no larger for it."""
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a process to stop; Windows has no SIGHUP."""


@dataclass(frozen=True)
class Encoding:
    """How the pictures of a film are stored.

    Attributes:
        codec: FFmpeg's name of the encoder.
        pixels: FFmpeg's name of the pixel format.
        options: of the encoder.
        colours: whether the pictures have colours, which are then those of BT.709.
        tags: texts that the container keeps, by name.
    """

    codec: str
    pixels: str
    options: Mapping[str, str]
    colours: bool = True
    tags: Mapping[str, str] = field(default_factory=dict)


class Film:
    """A film of which a reader sees every frame but the last few, at any time.

    Args:
        path: a new file with one of the suffixes of `CONTAINERS`, not that of another film.
        rate: frames per second.
        size: (height, width), both even for yuv420p.
        encoding: of its pictures.

    Raises:
        av.FFmpegError, OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int], encoding: Encoding) -> None:
        container_format = CONTAINERS[path.suffix.lower()]
        fragments = (
            {"cluster_time_limit": "1"}
            if container_format == "matroska"
            else {"movflags": "+frag_every_frame+empty_moov+default_base_moof"}
        )
        options = {**fragments, "flush_packets": "1"}
        self._container = import_av().open(_local(path), "w", format=container_format, options=options)
        self._container.metadata.update(encoding.tags)
        # FFmpeg's list of encoders is no type, so that mypy takes a name that is not written out for one of sound.
        self._stream = stream = cast("VideoStream", self._container.add_stream(encoding.codec, rate=rate))
        (stream.height, stream.width), stream.pix_fmt = size, encoding.pixels
        stream.options = dict(encoding.options)
        if encoding.colours:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE

    def write(self, image: VideoFrame) -> None:
        """Append a picture in the pixel format of the encoding."""
        self._encode(image)

    def close(self) -> None:
        """Write the frames that are still in the encoder, and close the file."""
        try:
            self._encode(None)
        finally:
            self._container.close()

    def _encode(self, image: VideoFrame | None) -> None:
        """Encode one image; None flushes the encoder."""
        for packet in self._stream.encode(image):
            self._container.mux(packet)


def finish_film(film: Path, target: Path) -> None:
    """Write a closed `Film` as an ordinary file with its index in front, and remove it. No frame is encoded anew.

    `target` stays as it is until the new file is complete; the film stays until then. Both may be one file.

    Raises:
        av.FFmpegError, OSError: the target cannot be written.
    """
    av = import_av()
    container_format = CONTAINERS[target.suffix.lower()]
    options = {} if container_format == "matroska" else {"movflags": "+faststart"}
    with (
        atomic_write(target) as part,
        av.open(_local(film)) as source,
        av.open(_local(part), "w", format=container_format, options=options) as whole,
    ):
        whole.metadata.update(source.metadata)
        stream = whole.add_stream_from_template(source.streams.video[0])
        stream.codec_context.framerate = source.streams.video[0].average_rate  # the template lacks it
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:  # the last one is empty
                packet.stream = stream
                whole.mux(packet)
    if film != target:
        film.unlink()


def _local(path: Path) -> str:
    """A path that FFmpeg takes for a file, even if its name begins as an address does (`take:1.mp4`)."""
    return str(path.absolute())


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Delay Ctrl-C, and other requests to stop that have a handler in Python, until the block ends.

    Blocks may stand inside of each other. Only the main thread gets signals; other threads need no delay.

    Yields:
        The numbers of the signals that came so far.
    """
    handlers = {number: signal.getsignal(number) for number in STOPS}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    came: list[int] = []
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield came
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
