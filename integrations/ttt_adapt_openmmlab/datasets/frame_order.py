"""Which video a frame belongs to, where in it, and whether the frames of a stream come in order."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ttt_adapt.errors import DataError
from ttt_adapt.integration import natural_key

Key = tuple[tuple[int, int, str], ...]


def video_of(metainfo: Mapping[str, Any]) -> str:
    """The video that a frame belongs to: its `video_id`, or else the folder of its `img_path`.

    Args:
        metainfo: of a data sample, or a data info of a dataset.

    Raises:
        DataError: neither is there.
    """
    if metainfo.get("video_id") is not None:
        return str(metainfo["video_id"])
    path = metainfo.get("img_path")
    if not isinstance(path, str | os.PathLike):
        raise DataError(
            f"a frame names no video: got img_path={path!r} and no video_id; expected one of the two in its metainfo. "
            "Let the dataset set video_id, and keep it with meta_keys=(..., 'video_id', 'frame_id') in the pipeline's "
            "PackSegInputs or PackDetInputs"
        )
    return os.path.dirname(os.fspath(path)) or "."


def frame_key(metainfo: Mapping[str, Any]) -> Key:
    """What frames of one video are ordered by: `frame_id`, or else the file name with its numbers as numbers.

    Args:
        metainfo: of a data sample, or a data info of a dataset.

    Raises:
        DataError: neither is there, or `frame_id` is no number.
    """
    number, path = metainfo.get("frame_id"), metainfo.get("img_path")
    if number is None and isinstance(path, str | os.PathLike):
        return natural_key(os.path.splitext(os.path.basename(os.fspath(path)))[0])
    try:
        return ((0, int(number), ""),)  # type: ignore[arg-type]  # None raises, like anything else that is no number
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a frame of video {video_of(metainfo)!r} has frame_id={number!r} and img_path={path!r}; expected its "
            "number in the video, or a file name to order it by: let the dataset set frame_id, and keep it in the "
            "meta_keys of PackSegInputs or PackDetInputs"
        ) from error


def file_of(metainfo: Mapping[str, Any]) -> str:
    """How a message names a frame."""
    return str(metainfo.get("img_path") or f"frame {metainfo.get('frame_id')} of video {metainfo.get('video_id')}")


@dataclass
class _Video:
    file: str
    key: Key
    step: int | None = None
    gap: bool = False


class FrameOrder:
    """Follows a stream and refuses frames out of order and videos that come back."""

    def __init__(self) -> None:
        self._videos: dict[str, _Video] = {}
        self._current: str | None = None

    @property
    def videos(self) -> int:
        """How many videos have begun."""
        return len(self._videos)

    def follow(self, metainfo: Mapping[str, Any]) -> tuple[str, bool, str]:
        """Take the next frame.

        Returns:
            Its video, whether the video begins here, and a warning ("" for none; at most one per video) where frame
            numbers are missing.

        Raises:
            DataError: a frame out of order in its video, or of a video that ended before another began.
        """
        name, key, file = video_of(metainfo), frame_key(metainfo), file_of(metainfo)
        if name != self._current:
            if name in self._videos:
                raise DataError(
                    f"{file} is of video {name!r}, which ended before {self._current!r} began: the stream interleaves "
                    "videos. Adaptation needs them one after the other: use sampler=dict(type='VideoSampler')"
                )
            self._current, self._videos[name] = name, _Video(file, key)
            return name, True, ""
        video = self._videos[name]
        if key <= video.key:
            raise DataError(
                f"{file} comes after {video.file} in video {name!r}, and is not later in it: the stream is shuffled, "
                "or repeats frames. Adaptation needs frames in their order: use sampler=dict(type='VideoSampler'), "
                "which sorts them by frame_id, or by the numbers in the file names"
            )
        warning = self._gap(name, video, key, file)
        video.file, video.key = file, key
        return name, False, warning

    @staticmethod
    def _gap(name: str, video: _Video, key: Key, file: str) -> str:
        step = _step(video.key, key)
        known, video.step = video.step, step if video.step is None or step is None else min(step, video.step)
        if video.gap or step is None or known is None or step == known:
            return ""
        video.gap = True
        return f"frames are missing in video {name!r}: the numbers go in steps of {known}, and of {step} at {file}"


def _step(before: Key, key: Key) -> int | None:
    """The difference of two frame numbers; None where the names differ in more than one number."""
    if len(before) != len(key):
        return None
    differing = [(a, b) for a, b in zip(before, key, strict=True) if a != b]
    if len(differing) != 1 or differing[0][0][0] or differing[0][1][0]:
        return None
    return differing[0][1][1] - differing[0][0][1]
