"""Sources that the server reads itself: which ones it may, and the thread that reads one."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from ttt_adapt.errors import ConfigError, TTTAdaptError
from ttt_adapt.serve.refusal import Refusal
from ttt_adapt.video import VideoReader, open_video
from ttt_adapt.video.address import redacted

_logger = logging.getLogger("ttt_adapt.serve")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https", "srt", "udp", "rtp", "tcp")


class AllowedSources:
    """What clients may name as a source; by default nothing.

    Args:
        folder: files and folders in it may be read; None: none.
        addresses: what addresses may begin with, such as "rtsp://10.0.0.5/": their scheme, host and port are the same,
            and their path is this one or below it.

    Raises:
        ConfigError: there is no such folder, or something is no address of a network stream.
    """

    def __init__(self, folder: Path | None = None, addresses: Sequence[str] = ()) -> None:
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"sources is {folder}, which is no folder; expected one whose videos clients may name")
        self._folder = None if folder is None else folder.resolve()
        self._addresses = [_place(address) for address in addresses]
        for address, place in zip(addresses, self._addresses, strict=True):
            if place is None or place[0] not in _SCHEMES:
                raise ConfigError(
                    f"source_url is {redacted(address)!r}; expected the beginning of addresses that may be read, such "
                    f"as rtsp://10.0.0.5/, with one of {', '.join(_SCHEMES)}"
                )

    def find(self, source: str) -> Path | str:
        """What `open_video` is to read.

        Raises:
            Refusal: the source is not allowed, or there is no such file.
        """
        if _ADDRESS.match(source):
            place = _place(source)
            if place is None or not any(known is not None and _is_below(place, known) for known in self._addresses):
                raise _not_allowed("this address is not among those that the server may read (--source-url)")
            return source
        if self._folder is None:
            raise _not_allowed("this server reads no files (--sources names the folder whose files it may)")
        try:
            file = (self._folder / source).resolve()
            inside = file.is_relative_to(self._folder) and file != self._folder
            usable = inside and (file.is_file() or file.is_dir())
        except (OSError, ValueError, RuntimeError):  # a zero byte, a name that is too long, links in a circle
            inside, usable = True, False
        if not inside:
            raise _not_allowed("it does not lie in the folder whose files the server may read")
        if not usable:
            raise Refusal(404, "no_source", "the folder of the server has no such file or folder")
        return file

    def told(self, text: str) -> str:
        """A message without secrets, and without the place of the folder."""
        return redacted(text if self._folder is None else text.replace(f"{self._folder}/", ""))


def _not_allowed(why: str) -> Refusal:
    return Refusal(403, "source_not_allowed", f"the source is refused: {why}")


def _place(address: str) -> tuple[str, str, int | None, PurePosixPath] | None:
    """Scheme, host, port and path; None for what is no plain address."""
    if re.search(r"[\x00-\x20\\#\x7f]", address):
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    path = PurePosixPath(unquote(parts.path) or "/")
    if not host or ".." in path.parts or address.count("@") > ("@" in parts.netloc):
        return None
    return parts.scheme.lower(), host.lower(), port, path


def _is_below(place: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    return place[:3] == known[:3] and place[3].is_relative_to(known[3])


class SourceReader:
    """Reads a source in a thread of its own, and hands over frame by frame.

    Attributes:
        name: of the source, without secrets.
        state: "opening", "reading", "ended", "failed" or "stopped".
        error: why it failed; "" otherwise.

    Args:
        source: what `open_video` reads.
        name: as the client named it.
        take: is called with each frame, uint8 RGB [H, W, 3], and whether a new video begins with it; it may wait.
        told: makes a message fit for clients.
    """

    def __init__(
        self,
        source: Path | str,
        name: str,
        take: Callable[[np.ndarray, bool], None],
        told: Callable[[str], str],
    ) -> None:
        self.name, self.state, self.error = redacted(name), "opening", ""
        self._source, self._take, self._told = source, take, told
        self._video: VideoReader | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ttt-adapt source", daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether frames may still come."""
        return self.state in ("opening", "reading")

    @property
    def stats(self) -> dict[str, Any]:
        """What became of it so far, in plain values."""
        frames = None if self._video is None else self._video.stats.as_dict()
        return {"source": self.name, "state": self.state, "error": self.error, "frames": frames}

    def stop(self) -> None:
        """Take no more frames; does not wait for the end. May be called twice."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self.active:
            self.state = "stopped"
        if self._video is not None:  # a stalled one ends its waiting first, which may take a moment
            threading.Thread(target=self._video.close, daemon=True).start()

    def _run(self) -> None:
        try:
            with closing(open_video(self._source)) as self._video:
                if not self._stopped.is_set():
                    self.state = "reading"
                    self._read(self._video)
            self._end("ended")
        except TTTAdaptError as error:
            self._end("failed", self._told(str(error)))
        except Exception as error:
            _logger.exception("the source %s failed", self.name)
            self._end("failed", type(error).__name__)

    def _read(self, video: VideoReader) -> None:
        size = None
        for frame in video:
            if self._stopped.is_set():
                return
            self._take(frame, size not in (None, frame.shape[:2]))
            size = frame.shape[:2]

    def _end(self, state: str, error: str = "") -> None:
        if not self._stopped.is_set():
            self.state, self.error = state, error
