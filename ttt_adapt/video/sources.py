"""Frames from video files, cameras and network streams, decoded by FFmpeg (PyAV).

Why not decord: it decodes in a background thread whose queue has no bound. When the consumer is slower than the
decoder, as adaptation is, decord holds the whole clip in memory. PyAV decodes as far as it is asked to.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ttt_adapt.errors import VideoError, missing

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

NETWORK_TIMEOUT = 10.0  # seconds without an answer or without data
END_TOLERANCE = 0.1  # seconds (and two frames) that a file may end before its declared end


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


class VideoFile:
    """A video file, opened anew for each iteration. A `FrameSource`."""

    live = False

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        with self._open() as container:
            stream = video_stream(container, self.name)
            self.fps = _rate(stream)
            self.sounds = len(container.streams.audio)
            try:
                first = next(_decode(container, stream), None)
            except (_av_error(), _BrokenPacketError) as error:
                raise VideoError(f"{path} breaks at frame 0: {_reason(error)}") from error
            if first is None:
                raise VideoError(f"{path} has a video stream, but not one frame can be decoded from it.")
            self.size: tuple[int, int] = to_rgb(first).shape[:2]

    def _open(self) -> InputContainer:
        av = import_av()
        if self._path.is_file() and self._path.stat().st_size == 0:
            raise VideoError(f"{self._path} is empty (0 bytes).")
        try:
            return av.open(str(self._path))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"{self._path} cannot be opened as a video: {_reason(error)}. Is it a complete video file?"
            ) from error

    @cached_property
    def length(self) -> int | None:
        """Frames in the file: its packets without those that an edit list hides."""
        return len(self._times)

    @cached_property
    def _times(self) -> np.ndarray:
        """When each frame is shown, in seconds, in file order; NaN where the file does not say. Reads the file once."""
        return np.array(
            [float(p.pts * p.time_base) if p.pts is not None and p.time_base else np.nan for p in self._packets()]
        )

    def _packets(self) -> Iterator[Packet]:
        """The packets of frames that are shown, up to where the file can be read."""
        with self._open() as container, suppress(_av_error()):
            for packet in container.demux(container.streams.video[0]):
                if packet.size and not packet.is_discard:
                    yield packet

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield every frame. Where the file breaks, yield those before the break, then raise."""
        index = 0
        last: float | None = None  # when the last frame starts, where the container has times
        with self._open() as container:
            stream = video_stream(container, self.name)
            try:
                for frame in _decode(container, stream):
                    if frame.is_corrupt:
                        warnings.warn(f"{self._path}: frame {index} is damaged, parts are guessed.", stacklevel=2)
                    yield _checked(to_rgb(frame), self.size, self.name, index)
                    index += 1
                    last = frame.time
            except (_av_error(), _BrokenPacketError) as error:
                raise VideoError(
                    f"{self._path} breaks at frame {index}: {_reason(error)}. "
                    f"The {index} frames before it were delivered."
                ) from error
            declared = _declared_end(stream)
        if last is not None and last + 2 / (self.fps or 1) + END_TOLERANCE < declared:
            self._check_end(index, declared)

    def _check_end(self, index: int, declared: float) -> None:
        """Raise if the file was cut off between two frames; a last frame that is shown for long is fine."""
        times = (((p.pts or 0) + (p.duration or 0)) * p.time_base for p in self._packets() if p.time_base)
        end = float(max(times, default=0))
        if end + 2 / (self.fps or 1) + END_TOLERANCE < declared:
            raise VideoError(
                f"{self._path} breaks at frame {index}: it ends after {end:.2f} s, but declares {declared:.2f} s. "
                f"Was the copy or the recording cut off? The {index} frames before it were delivered."
            )

    @property
    def uneven(self) -> bool:
        """Whether the gaps between frames differ by more than a container's rounding of times (1 ms, Matroska's)."""
        gaps = np.diff(np.sort(self._times[np.isfinite(self._times)]))
        return bool(gaps.size and gaps.max() - gaps.min() > 0.0021)

    def close(self) -> None:
        """Do nothing: each iteration closes its own file."""


class LiveStream:
    """A network stream or a camera, opened once. A `FrameSource`.

    Packets that cannot be decoded are skipped, because live video loses some. A lost connection is an error.
    """

    live = True
    length: int | None = None
    sounds = 0
    uneven = False

    def __init__(self, url: str, *, name: str = "", format: str | None = None) -> None:
        av = import_av()
        self.name = name or url
        options = {"rtsp_transport": "tcp"} if url.startswith("rtsp") else {}
        timeout = None if format else NETWORK_TIMEOUT
        try:
            self._container = av.open(url, format=format, options=options, timeout=timeout)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.name} cannot be opened: {_reason(error)}") from error
        try:
            self._stream = video_stream(self._container, self.name)
            self.fps = _rate(self._stream)
            self._decoded = _decode(self._container, self._stream, skip_broken=True)
            self._first: np.ndarray | None = self._next(0)
            if self._first is None:
                raise VideoError(f"{self.name} ended before its first frame.")
        except BaseException:
            self.close()
            raise
        self.size: tuple[int, int] = self._first.shape[:2]

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield frames until the stream ends."""
        index = 0
        frame, self._first = self._first, None
        while (frame := self._next(index) if frame is None else frame) is not None:
            yield _checked(frame, self.size, self.name, index)
            frame, index = None, index + 1

    def _next(self, index: int) -> np.ndarray | None:
        try:
            frame = next(self._decoded, None)
        except _av_error() as error:
            raise VideoError(f"{self.name} broke at frame {index}: {_reason(error)}") from error
        return None if frame is None else to_rgb(frame)

    def close(self) -> None:
        """Release the camera or the connection."""
        self._container.close()


def camera(index: int) -> LiveStream:
    """Camera number `index`, through the capture of the platform: v4l2, avfoundation or dshow."""
    name = f"camera {index}"
    if sys.platform == "darwin":
        return LiveStream(str(index), name=name, format="avfoundation")
    if sys.platform != "win32":
        return LiveStream(f"/dev/video{index}", name=name, format="v4l2")
    import_av()
    from av.device import enumerate_input_devices  # dshow knows cameras by name only

    cameras = [device.name for device in enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(cameras):
        raise VideoError(f"{name} does not exist. Found: {cameras or 'none'}.")
    return LiveStream(f"video={cameras[index]}", name=name, format="dshow")


def video_stream(container: InputContainer, name: str) -> VideoStream:
    """The first video stream of `container`.

    Raises:
        VideoError: there is none, or FFmpeg cannot decode it.
    """
    if not container.streams.video:
        found = ", ".join(stream.type for stream in container.streams) or "none"
        raise VideoError(f"{name} has no video stream. Streams found: {found}.")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(
            f"{name} uses a codec that this FFmpeg build cannot decode. Convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        )
    return stream


def to_rgb(frame: VideoFrame) -> np.ndarray:
    """The frame as it is meant to be seen: uint8 RGB [H, W, 3], rotated as its display matrix says."""
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as `rot90` counts
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class _BrokenPacketError(Exception):
    """The container marks a packet as damaged or incomplete."""


def _decode(container: InputContainer, stream: VideoStream, *, skip_broken: bool = False) -> Iterator[VideoFrame]:
    """Frames in display order. The error of a broken packet comes after all frames that are shown before it."""
    for packet in container.demux(stream):
        try:
            if packet.is_corrupt:
                raise _BrokenPacketError("the data of this frame are incomplete")
            frames = packet.decode()
        except (_av_error(), _BrokenPacketError):
            if skip_broken:
                continue
            if packet.pts is not None:  # the decoder still holds good frames, which it reorders
                yield from (f for f in stream.decode(None) if f.pts is not None and f.pts < packet.pts)
            raise
        yield from frames


def _av_error() -> type[Exception]:
    return import_av().FFmpegError


def _rate(stream: VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _declared_end(stream: VideoStream) -> float:
    """When the last frame ends, in seconds, as the container declares (Matroska in a tag); 0 where it does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _checked(frame: np.ndarray, size: tuple[int, int], name: str, index: int) -> np.ndarray:
    if frame.shape[:2] != size:
        (h, w), (height, width) = frame.shape[:2], size
        raise VideoError(
            f"{name} changes its size at frame {index}: {h} x {w} pixels high and wide after {height} x {width}."
        )
    return frame


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
