"""Frames from a network stream, a camera or a pipe, as they come: one connection."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ttt_adapt.errors import VideoError
from ttt_adapt.video.address import redacted
from ttt_adapt.video.interlaced import deinterlaced
from ttt_adapt.video.rgb import ToRGB
from ttt_adapt.video.sources import Kind, av_error, checked, decode, import_av, rate_of, reason, video_stream

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

TIMEOUT = 10.0  # seconds


class LostError(VideoError):
    """A live source cannot be opened, or broke.

    Attributes:
        why: the reason, in a few words.
        hopeless: whether another try must fail too.

    Args:
        message: of the error.
        why: as above.
        hopeless: as above.
    """

    def __init__(self, message: str, why: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.why, self.hopeless = why, hopeless


class LiveStream:
    """One connection to a network stream or a camera, or a pipe. A `FrameSource`.

    Packets that cannot be decoded are skipped, because live video loses some. A lost connection is an error. A network
    stream that says how long it is, is a film on a server.

    The addresses in FFmpeg's errors have their secrets, so they are no cause or context of the errors raised here.

    Args:
        url: the address, or what FFmpeg calls the device.
        name: for messages; by default the address without its secrets.
        format: FFmpeg's name of a kind of device.
        open_timeout: seconds until the first frame.
        read_timeout: seconds without a frame after which the connection is lost. Neither acts on a pipe.
        clock: gives seconds.

    Raises:
        LostError: it cannot be opened, or ends before its first frame.
        VideoError: it has no video that can be decoded.
    """

    restarts = False
    patience: float | None = None
    length: int | None = None
    sounds = 0
    uneven = False

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        format: str | None = None,
        open_timeout: float = TIMEOUT,
        read_timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name or redacted(url)
        self._url = url
        self._open_timeout, self._read_timeout, self._clock = open_timeout, read_timeout, clock
        self._patient = url.startswith("file:")
        self._in_use, self._closing = threading.Lock(), False
        self._index, self._deadline = 0, clock() + open_timeout
        self._to_rgb = ToRGB(self.name)
        self._container = self._open(url, format)
        try:
            self._stream = video_stream(self._container, self.name, self._to_rgb.say)
            self.fps = rate_of(self._stream)
            on_server = not self._patient and format is None and self._container.duration is not None
            self.kind: Kind = "pipe" if self._patient else "film" if on_server else "live"
            decoded = decode(self._packets(), self._stream, skip_broken=True)
            self._decoded = deinterlaced(decoded, self._stream, self._to_rgb.say)
            self._first: np.ndarray | None = self._decode()
            if self._first is None:
                why = "it ended before its first frame"
                raise LostError(f"{self.name} ended before its first frame.", why)
        except BaseException:
            self.close()
            raise
        self.size: tuple[int, int] = self._first.shape[:2]

    def _open(self, url: str, format: str | None) -> InputContainer:
        av = import_av()
        options = {"rtsp_transport": "tcp"} if url.lower().startswith("rtsp") else {}
        timeout = None if self._patient else (self._open_timeout, self._read_timeout)
        try:
            return av.open(url, format=format, options=options, timeout=timeout, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            why = self._why(error, f"no answer in {self._open_timeout:g} s")
            if hopeless := isinstance(error, (av.ProtocolNotFoundError, ValueError)):
                why += f"; this build of FFmpeg does not know {url.partition(':')[0]}" if ":" in url else ""
        raise LostError(f"{self.name} cannot be opened: {why}", why, hopeless)

    def frames(self, any_size: bool = False) -> Generator[np.ndarray, None, None]:
        """Yield frames until the stream ends."""
        while (frame := self.next_frame()) is not None:
            yield frame if any_size else checked(frame, self.size, self.name, self._index - 1)

    def next_frame(self) -> np.ndarray | None:
        """The next frame, uint8 RGB [H, W, 3]; None at the end, and when the stream is closed.

        Raises:
            LostError: the connection broke, or no frame came in time.
        """
        try:
            with self._in_use:
                if self._closing:
                    return None
                frame, self._first = self._first, None
                if frame is None:
                    self._deadline = self._clock() + self._read_timeout
                    frame = self._decode()
                self._index += 1
                return frame
        finally:
            if self._closing:  # meanwhile, and `close` could not
                self.close()

    def _decode(self) -> np.ndarray | None:
        try:
            frame = next(self._decoded, None)
            return None if frame is None else self._to_rgb(frame)
        except (av_error(), TimeoutError) as error:
            why = self._why(error, f"no frame for {self._read_timeout:g} s")
        raise LostError(f"{self.name} broke at frame {self._index}: {why}", why)

    def _packets(self) -> Iterator[Packet]:
        """The packets of the video. Those of its sound do not hide that it has stopped."""
        for packet in self._container.demux():
            if not self._patient and self._clock() > self._deadline:
                raise TimeoutError
            if packet.stream is self._stream:
                yield packet

    def _why(self, error: Exception, late: str) -> str:
        """The reason of an error of FFmpeg, in words; `late` for one of its timeouts."""
        if isinstance(error, import_av().error.ExitError) or type(error) is TimeoutError:
            return late
        if getattr(error, "errno", None) == errno.EIO and not self._patient:
            return "the connection broke off"  # which FFmpeg calls an input/output error, whatever the device
        return redacted(reason(error), [self._url])

    def interrupt(self) -> None:
        """Do nothing: FFmpeg's reads end by themselves."""

    def close(self) -> None:
        """Release the camera or the connection; where a thread reads from it, as soon as that read ends."""
        self._closing = True
        if self._in_use.acquire(blocking=False):
            try:
                self._container.close()
            finally:
                self._in_use.release()


def camera(index: int, open_timeout: float = TIMEOUT, read_timeout: float = TIMEOUT) -> LiveStream:
    """Camera number `index`, through the capture of the platform: v4l2, avfoundation or dshow."""
    url, format = str(index), "avfoundation"
    if sys.platform == "win32":
        url, format = _dshow_name(index), "dshow"
    elif sys.platform != "darwin":
        url, format = f"/dev/video{index}", "v4l2"
    name = f"camera {index}"
    return LiveStream(url, name=name, format=format, open_timeout=open_timeout, read_timeout=read_timeout)


def _dshow_name(index: int) -> str:
    """What dshow calls a camera, which it knows by name only."""
    import_av()
    from av.device import enumerate_input_devices

    cameras = [device.name for device in enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(cameras):
        why = f"it does not exist. Found: {cameras or 'none'}"
        raise LostError(f"camera {index} does not exist. Found: {cameras or 'none'}.", why)
    return f"video={cameras[index]}"
