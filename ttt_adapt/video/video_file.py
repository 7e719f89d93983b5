"""Frames from a video file."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_adapt.errors import VideoError, warn
from ttt_adapt.video.interlaced import deinterlaced
from ttt_adapt.video.rgb import ToRGB
from ttt_adapt.video.sources import (
    BrokenPacketError,
    Kind,
    alpha_decoder,
    av_error,
    checked,
    decode,
    has_second_picture,
    import_av,
    local_url,
    rate_of,
    reason,
    video_stream,
)

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

END_TOLERANCE = 0.1  # seconds (and two frames) that a file may end before its declared end


class VideoFile:
    """A video file, opened anew for each iteration. A `FrameSource`."""

    kind: Kind = "film"
    restarts = True
    patience: float | None = None

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._to_rgb = ToRGB(self.name)
        with self._open() as container:
            stream = video_stream(container, self.name, self._to_rgb.say)
            self.fps = rate_of(stream)
            self.sounds = len(container.streams.audio)
            if has_second_picture(stream) and alpha_decoder(stream) is None:
                self._to_rgb.say("keeps its transparency in a second picture, which is not read: frames are opaque")
            try:
                first = next(self._decode(container, stream), None)
            except (av_error(), BrokenPacketError) as error:
                raise VideoError(f"{path} breaks at frame 0: {reason(error)}") from error
            if first is None:
                raise VideoError(f"{path} has a video stream, but not one frame can be decoded from it.")
            self.size: tuple[int, int] = self._to_rgb(first).shape[:2]

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        frames = decode(container.demux(stream), stream, decoder=alpha_decoder(stream))
        return deinterlaced(frames, stream, self._to_rgb.say)

    def _open(self) -> InputContainer:
        av = import_av()
        if self._path.is_file() and self._path.stat().st_size == 0:
            raise VideoError(f"{self._path} is empty (0 bytes): copy or record it anew.")
        if self._path.suffix == ".safetensors":
            raise VideoError(
                f"{self._path} is a file of weights; expected a video, a picture, or a folder of pictures."
            )
        try:
            return av.open(local_url(self._path), metadata_errors="replace")
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"{self._path} cannot be opened as a video: {reason(error)}. Is it a complete video file?"
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
        with self._open() as container, suppress(av_error()):
            for packet in container.demux(video_stream(container, self.name, self._to_rgb.say)):
                if packet.size and not packet.is_discard:
                    yield packet

    def frames(self, any_size: bool = False) -> Generator[np.ndarray, None, None]:
        """Yield every frame. Where the file breaks, yield those before the break, then raise."""
        index = 0
        last: float | None = None  # when the last frame starts, where the container has times
        with self._open() as container:
            stream = video_stream(container, self.name, self._to_rgb.say)
            try:
                for frame in self._decode(container, stream):
                    if frame.is_corrupt:
                        warn(f"{self._path}: frame {index} is damaged, parts are guessed.")
                    image = self._to_rgb(frame)
                    yield image if any_size else checked(image, self.size, self.name, index)
                    index += 1
                    last = frame.time
            except (av_error(), BrokenPacketError) as error:
                raise VideoError(
                    f"{self._path} breaks at frame {index}: {reason(error)}. "
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

    def interrupt(self) -> None:
        """Do nothing: a file is there."""

    def close(self) -> None:
        """Do nothing: each iteration closes its own file."""


def _declared_end(stream: VideoStream) -> float:
    """When the last frame ends, in seconds, as the container declares (Matroska in a tag); 0 where it does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
