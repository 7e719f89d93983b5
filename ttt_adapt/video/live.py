"""Frames from cameras and network streams, as they come."""

from __future__ import annotations

import sys
from collections.abc import Generator

import numpy as np

from ttt_adapt.errors import VideoError
from ttt_adapt.video.interlaced import deinterlaced
from ttt_adapt.video.rgb import ToRGB
from ttt_adapt.video.sources import av_error, checked, decode, import_av, rate_of, reason, video_stream

NETWORK_TIMEOUT = 10.0  # seconds without an answer or without data


class LiveStream:
    """A network stream, a camera or a pipe, opened once. A `FrameSource`.

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
        timeout = None if format or url.startswith("file:") else NETWORK_TIMEOUT
        self._to_rgb = ToRGB(self.name)
        try:
            self._container = av.open(url, format=format, options=options, timeout=timeout, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.name} cannot be opened: {reason(error)}") from error
        try:
            self._stream = video_stream(self._container, self.name, self._to_rgb.say)
            self.fps = rate_of(self._stream)
            decoded = decode(self._container, self._stream, skip_broken=True)
            self._decoded = deinterlaced(decoded, self._stream, self._to_rgb.say)
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
            yield checked(frame, self.size, self.name, index)
            frame, index = None, index + 1

    def _next(self, index: int) -> np.ndarray | None:
        try:
            frame = next(self._decoded, None)
        except av_error() as error:
            raise VideoError(f"{self.name} broke at frame {index}: {reason(error)}") from error
        return None if frame is None else self._to_rgb(frame)

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
