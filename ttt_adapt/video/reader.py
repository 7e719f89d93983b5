"""`open_video`: one way to read frames, whatever they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from ttt_adapt.errors import ConfigError, StateError, VideoError
from ttt_adapt.video.folder import ImageFolder
from ttt_adapt.video.read_ahead import ReadAhead
from ttt_adapt.video.sources import FrameSource, LiveStream, VideoFile, camera


def open_video(source: str | int | os.PathLike[str], *, read_ahead: int = 4) -> VideoReader:
    """Open a video for reading frame by frame.

    | source | frames | `fps` | `length` |
    |---|---|---|---|
    | path of a video file | every frame once, in display order, upright | average rate | frames in the file |
    | folder of images | in natural order: `frame_2` before `frame_10` | None | number of images |
    | camera index, such as `0` or `"0"` | as the camera delivers them | if announced | None |
    | URL, such as `rtsp://...` or `https://...` | as the stream delivers them | if announced | None |

    The first frame is decoded here, so what cannot be read fails here. Frames of variable-rate files are neither
    repeated nor dropped. The rotation that phones store is applied; non-square pixels stay as they are.

    Args:
        source: what to read. A digit string is a camera; pass `pathlib.Path("0")` for a file of that name.
        read_ahead: frames that wait decoded while the consumer works, at least 1. Small values keep the delay
            behind a camera small.

    Raises:
        VideoError: the source cannot be opened, or holds no frame that can be decoded.
        MissingPackageError: `av` (or, for a folder, `pillow`) is not installed.
        ConfigError: `read_ahead` is not a positive integer.
    """
    if isinstance(read_ahead, bool) or not isinstance(read_ahead, int) or read_ahead < 1:
        raise ConfigError(f"read_ahead is {read_ahead!r}, expected an integer of at least 1.")
    return VideoReader(_open_source(source), read_ahead)


def _open_source(source: str | int | os.PathLike[str]) -> FrameSource:
    if isinstance(source, bool) or not isinstance(source, (str, int, os.PathLike)):
        raise VideoError(f"source is {source!r}, expected a path, a camera index or a URL.")
    if isinstance(source, int) or (isinstance(source, str) and re.fullmatch(r"[0-9]+", source)):
        return camera(int(source))
    if isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
        return LiveStream(source)
    path = Path(source)
    if not path.exists():
        raise VideoError(f"{path} does not exist (looked from {Path.cwd()}).")
    return ImageFolder(path) if path.is_dir() else VideoFile(path)


class VideoReader:
    """Frames of one source, lazily: iterate over it; made by `open_video`.

    Yields uint8 RGB arrays [H, W, 3], each the caller's own. A thread decodes ahead while the consumer works and ends
    with the iteration, whether that is used up, broken out of, or closed. Files and folders start again from
    frame 0 with each iteration; a live source goes on, and allows one iteration at a time.

    A source that breaks in the middle yields every frame before the break and then raises a `VideoError` with the
    index of the frame that could not be read. Damage that the decoder patches up does not end a video; the frames
    that it reports as damaged are warned about.

    Attributes:
        name: of the source, for messages and progress bars.
        size: (height, width) of every frame, in pixels.
        fps: frames per second; None where the source has no rate.
        sounds: number of sound tracks of a file, which are not read.
    """

    def __init__(self, source: FrameSource, read_ahead: int) -> None:
        self.name = source.name
        self.size = source.size
        self.fps = source.fps
        self.sounds = source.sounds
        self._source = source
        self._depth = read_ahead
        self._running: set[ReadAhead[np.ndarray]] = set()
        self._closed = False

    @property
    def uneven(self) -> bool:
        """Whether the frames are known not to be evenly spaced in time. For a file this reads through it once."""
        return self._source.uneven

    @property
    def length(self) -> int | None:
        """Number of frames, None for live sources. For a file this reads through it once, without decoding."""
        return self._source.length

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._closed:
            raise StateError(f"The reader of {self.name} is closed. Call open_video again.")
        if self._source.live and self._running:
            raise StateError(f"{self.name} is live and already being iterated over. Close that iteration first.")
        return self._iterate()

    def _iterate(self) -> Iterator[np.ndarray]:
        if self._closed:
            return
        with ReadAhead(self._source.frames(), self._depth) as frames:
            self._running.add(frames)
            try:
                yield from frames
            finally:
                self._running.discard(frames)

    def close(self) -> None:
        """Stop decoding and release the source; iterations that still run end. Idempotent."""
        self._closed = True
        for frames in list(self._running):
            frames.close()
        self._source.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
