"""A film that plays while it is being written: the encoder behind `VideoWriter` and `LabelVideoWriter`.

An ordinary mp4 has its index at the end, and a process that is killed never writes it. This film waits for no end:
every frame is a fragment of its own (of Matroska: a cluster), which is on disk as soon as the encoder has made it. The
encoder looks one frame ahead and has no B-frames: a killed process loses three or four frames. `join_films` makes an
ordinary file of the fragments once all frames are there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ttt_adapt.files import atomic_write
from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import Packet, VideoFrame
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


def join_films(films: Sequence[Path], target: Path, rate: Fraction) -> None:
    """Write closed `Film`s, one behind the other, as an ordinary file with its index in front; nothing is encoded anew.

    `target` stays as it is until the new file is complete. It may be one of the films; the others stay.

    Args:
        films: of one size and encoding.
        target: the file.
        rate: frames per second.

    Raises:
        av.FFmpegError, OSError: the target cannot be written, or the films do not fit together.
    """
    av = import_av()
    container_format = CONTAINERS[target.suffix.lower()]
    options = {} if container_format == "matroska" else {"movflags": "+faststart"}
    with (
        atomic_write(target) as part,
        av.open(_local(films[0])) as first,
        av.open(_local(part), "w", format=container_format, options=options) as whole,
    ):
        whole.metadata.update(first.metadata)
        stream = whole.add_stream_from_template(first.streams.video[0])
        stream.codec_context.framerate = rate  # the template lacks it
        head = first.streams.video[0].codec_context.extradata
        for index, packet in enumerate(_packets(films, head)):
            packet.stream, packet.time_base = stream, 1 / rate
            packet.pts = packet.dts = (
                index  # no frame refers to a later one, so that packets come in the order of frames
            )
            packet.duration = 1
            whole.mux(packet)


def _packets(films: Sequence[Path], head: bytes | None) -> Iterator[Packet]:
    """The encoded frames of films, in order. `head` is what a decoder needs to know of them."""
    for film in films:
        with import_av().open(_local(film)) as source:
            video = source.streams.video[0]
            if video.codec_context.extradata != head:
                raise OSError(
                    f"{film} was encoded otherwise than {films[0]}: by another version of FFmpeg, or in another size"
                )
            yield from (packet for packet in source.demux(video) if packet.dts is not None)  # the last one is empty


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
