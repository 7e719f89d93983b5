"""What frames are read from: the parts that files, cameras and network streams share. FFmpeg (PyAV) decodes them.

Why not decord: it decodes in a background thread whose queue has no bound. When the consumer is slower than the
decoder, as adaptation is, decord holds the whole clip in memory. PyAV decodes as far as it is asked to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ttt_adapt.errors import VideoError, missing

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream


_READ_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the second picture, by the names of those that do not."""


class FrameSource(Protocol):
    """What a `VideoReader` reads from; `frames` yields uint8 RGB [H, W, 3]."""

    name: str
    live: bool
    fps: float | None
    size: tuple[int, int]
    sounds: int

    @property
    def length(self) -> int | None:
        """Number of frames; None where it is unknown."""

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield the frames."""

    @property
    def uneven(self) -> bool:
        """Whether its frames are unevenly spaced in time, as far as is known."""

    def close(self) -> None:
        """Release what is open."""


def import_av() -> ModuleType:
    """The module `av` (PyAV).

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise missing("av", "video") from error
    return av


def local_url(path: str | os.PathLike[str]) -> str:
    """The name of a local file for FFmpeg, which would take the beginning of `cam:1.mp4` for a protocol."""
    return f"file:{os.fspath(path)}"


def video_stream(container: InputContainer, name: str, say: Callable[[str], None]) -> VideoStream:
    """The video of `container`: of several the one that players show. A cover picture is no video.

    Args:
        container: an open file or stream.
        name: of it, for messages.
        say: is told where there are several.

    Raises:
        VideoError: there is none, or FFmpeg cannot decode it.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    videos = [stream for stream in container.streams.video if not stream.disposition & still]
    if not videos:
        found = ", ".join(stream.type for stream in container.streams) or "none"
        cover = "; the video is a cover picture that does not move" if container.streams.video else ""
        raise VideoError(f"{name} has no video stream. Streams found: {found}{cover}.")
    best = container.streams.best("video")  # the default one, with frames enough
    stream = next((stream for stream in videos if stream is best), videos[0])
    if stream.codec_context is None:
        raise VideoError(
            f"{name} uses a codec that this FFmpeg build cannot decode. Convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    if len(videos) > 1:
        say(f"has {len(videos)} videos: number {videos.index(stream) + 1} is read, which players show")
    return stream


class BrokenPacketError(Exception):
    """The container marks a packet as damaged or incomplete."""


def alpha_decoder(stream: VideoStream) -> VideoCodecContext | None:
    """The decoder of a VP8 or VP9 video that keeps its transparency in a second picture; FFmpeg's own leave it out.

    Returns:
        None for other videos, and where this FFmpeg build has no libvpx.
    """
    av, own = import_av(), stream.codec_context
    if not has_second_picture(stream) or own.name not in _READ_ALPHA:
        return None
    try:
        decoder = av.CodecContext.create(_READ_ALPHA[own.name], "r")
    except (av.FFmpegError, ValueError):
        return None
    decoder.extradata = own.extradata
    for name in ("color_range", "color_primaries", "color_trc", "colorspace"):  # what the container says of colours
        setattr(decoder, name, getattr(own, name))
    return decoder


def has_second_picture(stream: VideoStream) -> bool:
    """Whether a video keeps its transparency in a second picture, as those of WebM do."""
    return "1" in (stream.metadata.get(key) for key in ("alpha_mode", "ALPHA_MODE"))


def decode(
    container: InputContainer,
    stream: VideoStream,
    *,
    skip_broken: bool = False,
    decoder: VideoCodecContext | None = None,
) -> Iterator[VideoFrame]:
    """Frames in display order. The error of a broken packet comes after all frames that are shown before it.

    Args:
        container: an open file or stream.
        stream: its video.
        skip_broken: leave broken packets out.
        decoder: what decodes; None: FFmpeg's choice for the stream.
    """
    decoder = decoder or stream.codec_context
    for packet in container.demux(stream):
        try:
            if packet.is_corrupt:
                raise BrokenPacketError("the data of this frame are incomplete")
            frames = decoder.decode(packet if packet.size else None)
        except (av_error(), BrokenPacketError):
            if skip_broken:
                continue
            if packet.pts is not None:  # the decoder still holds good frames, which it reorders
                yield from (f for f in decoder.decode(None) if f.pts is not None and f.pts < packet.pts)
            raise
        yield from frames


def av_error() -> type[Exception]:
    """The base class of FFmpeg's errors."""
    return import_av().FFmpegError


def rate_of(stream: VideoStream) -> float | None:
    """Frames per second; None where the container names no rate."""
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def checked(frame: np.ndarray, size: tuple[int, int], name: str, index: int) -> np.ndarray:
    """The frame.

    Raises:
        VideoError: it has another size than the frames before.
    """
    if frame.shape[:2] != size:
        (h, w), (height, width) = frame.shape[:2], size
        raise VideoError(
            f"{name} changes its size at frame {index}: {h} x {w} pixels high and wide after {height} x {width}."
        )
    return frame


def reason(error: Exception) -> str:
    """What went wrong, in words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
