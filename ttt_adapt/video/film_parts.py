"""A film that grows in several files, so that a run that was killed can go on with it: `NAME.part-000.mp4`, ...

Each part is a whole film of its own. A run closes one when it saves its state, so that the parts of a state hold
exactly the frames before it. At the end they are joined without encoding anything anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path


def part_path(path: Path, number: int) -> Path:
    """The file of a part of the film `path`, from 0."""
    return path.with_name(f"{path.stem}.part-{number:03d}{path.suffix}")


def remove_parts(path: Path, kept: int = 0) -> None:
    """Remove the parts of a film but the first `kept`."""
    for number in count(kept):
        part = part_path(path, number)
        if not part.exists():
            return
        part.unlink()


def missing_part(path: Path, sizes: Sequence[int], joined: bool) -> Path | None:
    """The first file of a film that is not there as it was.

    Args:
        path: of the film.
        sizes: bytes of its parts; of the film, if they were joined.
        joined: whether the parts were joined: the film is at `path`, or is the first part of one that went on.
    """
    if joined:
        return None if _has(path, sizes[0]) or _has(part_path(path, 0), sizes[0]) else path
    parts = [part_path(path, number) for number in range(len(sizes))]
    return next((part for part, size in zip(parts, sizes, strict=True) if not _has(part, size)), None)


def go_on_in_parts(path: Path, sizes: Sequence[int], joined: bool) -> list[Path]:
    """Make a film that `missing_part` found whole ready for more frames; returns its parts.

    What was written after them is removed.
    """
    if joined and _has(path, sizes[0]):
        os.replace(path, part_path(path, 0))
    remove_parts(path, len(sizes))
    return [part_path(path, number) for number in range(len(sizes))]


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
