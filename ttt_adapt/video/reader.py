"""`open_video`: one way to read frames, whatever they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from ttt_adapt.errors import ConfigError, StateError, VideoError
from ttt_adapt.files import PICTURE_SUFFIXES
from ttt_adapt.video.folder import ImageFolder, PictureFile
from ttt_adapt.video.live import LiveStream, camera
from ttt_adapt.video.read_ahead import ReadAhead
from ttt_adapt.video.sources import FrameSource, local_url
from ttt_adapt.video.video_file import VideoFile


def open_video(source: str | int | os.PathLike[str], *, read_ahead: int = 4) -> VideoReader:
    """Open a video for reading frame by frame.

    | source | frames | `fps` | `length` |
    |---|---|---|---|
    | path of a video file | every frame once, in display order, upright | average rate | frames in the file |
    | folder of images | in natural order: `frame_2` before `frame_10`, without labels | None | number of images |
    | path of a picture | all its pages | of an animation | number of pages |
    | camera index, such as `0` or `"0"` | as the camera delivers them | if announced | None |
    | URL, such as `rtsp://...` or `https://...` | as the stream delivers them | if announced | None |

    The first frame is decoded here, so a source that cannot be read raises here. Frames of files with a variable rate
    are neither repeated nor dropped. Frames are rotated and mirrored as the file says (phones store videos so). Pixels
    that are not square stay as they are. Interlaced frames are made whole, transparent pixels are shown on white, and
    HDR is mapped to ordinary brightness: a warning says each of these once.

    Args:
        source: what to read. A name that exists on disk is a file or a folder, whatever its characters. A whole number
            such as "0" is a camera; pass `pathlib.Path("0")` for a file of that name.
        read_ahead: how many frames are decoded in advance while the consumer works, at least 1. Small values keep the
            delay behind a camera small.

    Raises:
        VideoError: the source cannot be opened, or holds no frame that can be decoded.
        MissingPackageError: `av` (or, for a folder, `pillow`) is not installed.
        ConfigError: `read_ahead` is not a positive integer.
    """
    if isinstance(read_ahead, bool) or not isinstance(read_ahead, int) or read_ahead < 1:
        raise ConfigError(f"read_ahead is {read_ahead!r}, expected an integer of at least 1.")
    return VideoReader(_open_source(source), read_ahead)


def _open_source(source: str | int | os.PathLike[str]) -> FrameSource:
    if isinstance(source, bool) or not isinstance(source, (str, int, os.PathLike)) or source == "":
        raise VideoError(f"source is {source!r}, expected a path, a camera index or a URL.")
    if isinstance(source, int) or (isinstance(source, str) and re.fullmatch(r"0|[1-9][0-9]*", source)):
        return camera(int(source))
    path = Path(source)
    if isinstance(source, str) and not _exists(path):
        if source.lower().startswith("file:"):
            path = Path(url2pathname(urlsplit(source).path) if source[5:].startswith("//") else source[5:])
        elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
            return LiveStream(source)
    if not _exists(path):
        raise VideoError(f"{path} does not exist (looked from {Path.cwd()}); expected a video file or a folder.")
    if path.is_dir():
        return ImageFolder(path)
    if path.is_fifo():
        return LiveStream(local_url(path), name=path.name)
    return PictureFile(path) if path.suffix.lower() in PICTURE_SUFFIXES - {".gif"} else VideoFile(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for the file system, or with a null character
        return False


class VideoReader:
    """The frames of one source, decoded while you iterate over it. `open_video` makes it.

    Yields uint8 RGB arrays [H, W, 3]; the caller may change them. A thread decodes ahead while the consumer works. It
    ends with the iteration: at the last frame, at a `break`, or when it is closed. Files and folders start again at
    frame 0 with each iteration. A live source (a camera, a network stream) goes on where it is, and allows one
    iteration at a time.

    A source that breaks in the middle yields every frame before the break, and then raises a `VideoError` with the
    index of the frame that could not be read. Damage that the decoder can repair does not end a video; frames that it
    reports as damaged give a warning.

    Attributes:
        name: the source's name, for messages and progress bars.
        size: (height, width) of every frame, in pixels.
        fps: frames per second; None where the source has no rate.
        sounds: number of sound tracks of a file, which are not read.
        names: a name for every frame, of the files of a folder; None where frames have no names.
    """

    def __init__(self, source: FrameSource, read_ahead: int) -> None:
        self.name = source.name
        self.size = source.size
        self.fps = source.fps
        self.sounds = source.sounds
        self.names: tuple[str, ...] | None = getattr(source, "names", None)
        self._source = source
        self._depth = read_ahead
        self._running: set[ReadAhead[np.ndarray]] = set()
        self._closed = False

    @property
    def uneven(self) -> bool:
        """Whether the frames are unevenly spaced in time, as far as is known. For a file, this reads it once."""
        return self._source.uneven

    @property
    def length(self) -> int | None:
        """Number of frames, None for live sources. For a file, this reads it once, without decoding."""
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
        """Stop decoding and release the source. Iterations that still run end. May be called twice."""
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
