"""`open_video`: one way to read frames, whatever they come from."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from ttt_adapt.errors import ConfigError, StateError, VideoError
from ttt_adapt.files import PICTURE_SUFFIXES, exists
from ttt_adapt.video.address import redacted
from ttt_adapt.video.folder import ImageFolder, PictureFile
from ttt_adapt.video.live import LiveStream, camera
from ttt_adapt.video.read_ahead import ReadAhead
from ttt_adapt.video.reconnect import Reconnect, Reconnecting
from ttt_adapt.video.sources import FrameSource, local_url
from ttt_adapt.video.stats import FrameCounts, SourceStats
from ttt_adapt.video.video_file import VideoFile

Keep = Literal["newest", "every"]
OnResize = Literal["reset", "error"]
_logger = logging.getLogger("ttt_adapt.video")


def open_video(
    source: str | int | os.PathLike[str],
    *,
    read_ahead: int = 4,
    keep: Keep | None = None,
    on_resize: OnResize | None = None,
    reconnect: Reconnect | None = None,
    say: Callable[[str], None] = _logger.warning,
) -> VideoReader:
    """Open a video for reading frame by frame.

    | source | frames | `fps` | `length` |
    |---|---|---|---|
    | path of a video file | every frame once, in display order, upright | average rate | frames in the file |
    | folder of images | in natural order: `frame_2` before `frame_10`, without labels | None | number of images |
    | path of a picture | all its pages | of an animation | number of pages |
    | camera index, such as `0` or `"0"` | the newest one, as the camera delivers them | if announced | None |
    | URL, such as `rtsp://...` or `https://...` | the newest one; every one of a film | if announced | None |
    | named pipe | every frame, once | if announced | None |

    The first frame is decoded here, so a source that cannot be read raises here. Frames of files with a variable rate
    are neither repeated nor dropped. Frames are rotated and mirrored as the file says (phones store videos so). Pixels
    that are not square stay as they are. Interlaced frames are made whole, transparent pixels are shown on white, and
    HDR is mapped to ordinary brightness: a warning says each of these once.

    A camera or a network stream is opened again when it is lost, see `Reconnect`. Messages and errors never have the
    user, the password or the values of a query that are in an address.

    Args:
        source: what to read. A name that exists on disk is a file or a folder, whatever its characters. A whole number
            such as "0" is a camera; pass `pathlib.Path("0")` for a file of that name.
        read_ahead: where every frame is kept, how many are decoded in advance while the consumer works, at least 1.
        keep: "every": the source waits for the consumer, as far as it can. "newest": it does not wait; a frame that
            nobody has asked for makes way for the next one. A film is then read at its own rate, as if it were live.
            None: "newest" for live sources, otherwise "every".
        on_resize: what a change of the frames' size in the middle is. "reset": a new video, which begins with
            that frame; the reader's `size` changes. "error": a `VideoError`. None: "reset" for live sources, otherwise
            "error".
        reconnect: limits for live sources; None: `Reconnect()`.
        say: is told in words when a live source is lost, comes back, or changes its size; also from a thread. By
            default, the logger "ttt_adapt.video" is.

    Raises:
        VideoError: the source cannot be opened, or holds no frame that can be decoded.
        MissingPackageError: `av` (or, for a folder, `pillow`) is not installed.
        ConfigError: an argument is out of range, or the source is a film without a rate, and `keep` is "newest".
    """
    if isinstance(read_ahead, bool) or not isinstance(read_ahead, int) or read_ahead < 1:
        raise ConfigError(f"read_ahead is {read_ahead!r}, expected an integer of at least 1.")
    for name, value, choices in (("keep", keep, get_args(Keep)), ("on_resize", on_resize, get_args(OnResize))):
        if value is not None and value not in choices:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(choices)}")
    counts = FrameCounts()
    opened = _open_source(source, reconnect or Reconnect(), counts, say)
    try:
        return VideoReader(opened, read_ahead, keep=keep, on_resize=on_resize, counts=counts, say=say)
    except BaseException:
        opened.close()
        raise


def _open_source(
    source: str | int | os.PathLike[str], limits: Reconnect, counts: FrameCounts, say: Callable[[str], None]
) -> FrameSource:
    if isinstance(source, bool) or not isinstance(source, (str, int, os.PathLike)) or source == "":
        raise VideoError(f"source is {redacted(repr(source))}, expected a path, a camera index or a URL.")
    if isinstance(source, int) or (isinstance(source, str) and re.fullmatch(r"0|[1-9][0-9]*", source)):
        return _live(partial(camera, int(source), *limits.timeouts), limits, counts, say)
    path = Path(source)
    if isinstance(source, str) and not exists(path):
        if source.lower().startswith("file:"):
            path = Path(url2pathname(urlsplit(source).path) if source[5:].startswith("//") else source[5:])
        elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
            opening, reading = limits.timeouts
            connect = partial(LiveStream, source, open_timeout=opening, read_timeout=reading)
            return _live(connect, limits, counts, say)
    if not exists(path):
        raise VideoError(
            f"{redacted(source)} does not exist (looked from {Path.cwd()}); expected a video file or a folder."
        )
    if path.is_dir():
        return ImageFolder(path)
    if path.is_fifo():
        return LiveStream(local_url(path), name=path.name)
    return PictureFile(path) if path.suffix.lower() in PICTURE_SUFFIXES - {".gif"} else VideoFile(path)


def _live(
    connect: Callable[[], LiveStream], limits: Reconnect, counts: FrameCounts, say: Callable[[str], None]
) -> FrameSource:
    """A source that is opened again when it is lost; a film on a server, which would begin anew, as it is."""
    source = Reconnecting(connect, limits, counts=counts, say=say)
    return source if source.connection.kind == "live" else source.connection


class VideoReader:
    """The frames of one source, decoded while you iterate over it. `open_video` makes it.

    Yields uint8 RGB arrays [H, W, 3]; the caller may change them. A thread decodes ahead while the consumer works. It
    ends with the iteration: at the last frame, at a `break`, or when it is closed. Files and folders start again at
    frame 0 with each iteration. A live source (a camera, a network stream) goes on where it is, and allows one
    iteration at a time.

    A source that breaks in the middle yields every frame before the break, and then raises a `VideoError` with the
    index of the frame that could not be read. A live one is opened again first. Damage that the decoder can repair does
    not end a video; frames that it reports as damaged give a warning.

    Attributes:
        name: the source's name, for messages and progress bars; without secrets.
        size: (height, width) of the frames, in pixels: of the last one that the iteration returned, or of the first.
        fps: frames per second; None where the source has no rate.
        sounds: number of sound tracks of a file, which are not read.
        names: a name for every frame, of the files of a folder; None where frames have no names.
        live: whether the source waits for nobody.
        any_size: whether the size of the frames may change.
        film: whether all frames are there, so that the source begins at frame 0 whenever it is opened.
        counts: what became of the frames. A consumer that wants it in `stats` calls `counts.adapted.add()` and
            `counts.predicted.add()`.

    Args:
        source: what is read.
        read_ahead: how many frames wait at most.
        keep, on_resize: see `open_video`.
        counts: counts the frames.
        say: is told when the size changes.

    Raises:
        ConfigError: `keep` is "newest", and the source is a film without a rate.
    """

    def __init__(
        self,
        source: FrameSource,
        read_ahead: int,
        *,
        keep: Keep | None,
        on_resize: OnResize | None,
        counts: FrameCounts,
        say: Callable[[str], None],
    ) -> None:
        self.name = source.name
        self.size = source.size
        self.fps = source.fps
        self.sounds = source.sounds
        self.names: tuple[str, ...] | None = getattr(source, "names", None)
        self.live, self.film = source.kind == "live", source.kind == "film"
        self.counts = counts
        self._source, self._say = source, say
        self._newest = self.live if keep is None else keep == "newest"
        self.any_size = self.live if on_resize is None else on_resize == "reset"
        self._depth = 1 if self._newest else read_ahead
        self._running: set[ReadAhead[np.ndarray]] = set()
        self._closed = False
        if self._newest and source.kind == "film" and not source.fps:
            raise ConfigError(
                f"keep is 'newest', and {self.name} has no frame rate at which its frames could come: leave keep out"
            )

    @property
    def stats(self) -> SourceStats:
        """What became of the frames so far, over all iterations."""
        return self.counts.stats()

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
        if not self._source.restarts and self._running:
            raise StateError(f"{self.name} is live and already being iterated over. Close that iteration first.")
        return self._iterate()

    def _iterate(self) -> Iterator[np.ndarray]:
        if self._closed:
            return
        size = self._source.size if self._source.restarts else self.size
        with self._ahead() as frames:
            self._running.add(frames)
            try:
                while (frame := self._taken(frames)) is not None:
                    if frame.shape[:2] != size:
                        self._resized(size, frame.shape[:2])
                    self.size = size = frame.shape[:2]
                    yield frame
            finally:
                self._running.discard(frames)

    def _ahead(self) -> ReadAhead[np.ndarray]:
        """A thread that reads the frames of one iteration."""
        stop = threading.Event()
        frames = self._counted(self._source.frames(self.any_size))
        if self._newest and self._source.kind == "film" and self.fps:
            frames = _paced(frames, self.fps, stop)

        def interrupt() -> None:
            stop.set()
            self._source.interrupt()

        return ReadAhead(
            frames,
            self._depth,
            newest=self._newest,
            dropped=self.counts.dropped.add,
            interrupt=interrupt,
            patience=self._source.patience,
        )

    def _counted(self, frames: Generator[np.ndarray, None, None]) -> Generator[np.ndarray, None, None]:
        with closing(frames):
            for frame in frames:
                self.counts.frame_came()
                yield frame

    def _taken(self, frames: ReadAhead[np.ndarray]) -> np.ndarray | None:
        try:
            frame = next(frames, None)
        except TimeoutError:
            silence = self.stats.silence
            raise VideoError(
                f"{self.name} gave no frame for {silence:.1f} s, and the read of the next one does not end. "
                "`max_silence` sets when it is given up."
            ) from None
        if frame is not None:
            self.counts.taken.add()
        return frame

    def _resized(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        self.counts.resized += 1
        (h, w), (height, width) = after, before
        self._say(
            f"{self.name} changes its size: {h} x {w} pixels high and wide after {height} x {width}; a new video begins"
        )

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


def _paced(
    frames: Generator[np.ndarray, None, None], fps: float, stop: threading.Event
) -> Generator[np.ndarray, None, None]:
    """The frames of a film, none before its time; all at once when `stop` is set."""
    begun = time.monotonic()
    with closing(frames):
        for index, frame in enumerate(frames):
            stop.wait(max(begun + index / fps - time.monotonic(), 0))
            yield frame
