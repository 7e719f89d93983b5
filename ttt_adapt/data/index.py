"""`index.json`, which lies beside clips: class names and colours, the ignore id, and the times of their frames."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_adapt.data.classes import class_names, ignore_id
from ttt_adapt.errors import DataError

Palette = tuple[tuple[int, int, int], ...]
"""One RGB colour, 0 to 255, for each class."""


class Index:
    """The contents of an `index.json`. Its parts are checked when they are asked for: arguments may replace them.

    Args:
        file: where it lies.
        data: its contents.
    """

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        self._file, self._data = file, data

    def classes(self) -> tuple[str, ...]:
        """The class names.

        Raises:
            DataError: as `class_names` does.
        """
        return class_names(self._data["classes"], str(self._file))

    def ignore(self) -> int:
        """The id of void pixels; 255 where the file has none.

        Raises:
            DataError: as `ignore_id` does.
        """
        return ignore_id(self._data.get("ignore"), str(self._file))

    def palette(self) -> Palette:
        """The colours of the classes; () where the file has none.

        Raises:
            DataError: they are no list of one colour for each class, and no colours by class name; or as `class_names`.
        """
        if "palette" not in self._data:
            return ()
        given, classes = self._data["palette"], self.classes()
        expected = f"expected one colour [red, green, blue] from 0 to 255 for each of the {len(classes)} classes"
        if isinstance(given, dict):
            if missing := [name for name in classes if name not in given]:
                raise DataError(f"the palette in {self._file} has no colour for {', '.join(missing)}; {expected}")
            given = [given[name] for name in classes]
        if not isinstance(given, list) or len(given) != len(classes) or not all(map(is_colour, given)):
            raise DataError(f"the palette in {self._file} is {_short(given)}; {expected}")
        return tuple((colour[0], colour[1], colour[2]) for colour in given)

    def fps(self, clip: str) -> float | None:
        """Labelled frames of a clip per second; None where the file does not say."""
        gap = self._number(self._clip(clip).get("label_gap_s"), f"label_gap_s of clip {clip}")
        return 1.0 / gap if gap else None

    def times(self, clip: str, frames: Sequence[str]) -> tuple[float, ...] | None:
        """Seconds of the frames with these file names; None where one of them has no time."""
        listed = self._entries(self._clip(clip).get("frames"), f"frames of clip {clip}")
        named = {str(entry.get("frame")): entry.get("t") for entry in listed}
        seconds = {frame: self._number(t, f"t of frame {frame}") for frame, t in named.items()}
        times = [seconds.get(frame) for frame in frames]
        known = [time for time in times if time is not None]
        return tuple(known) if len(known) == len(times) else None

    def _clip(self, name: str) -> dict[str, Any]:
        clips = self._entries(self._data.get("clips"), "clips")
        return next((clip for clip in clips if clip.get("clip") == name), {})

    def _entries(self, given: Any, what: str) -> list[dict[str, Any]]:
        if given is None:
            return []
        if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
            raise DataError(f"{self._file}: {what} is {_short(given)}; expected a list of objects, or leave it out")
        return given

    def _number(self, given: Any, what: str) -> float | None:
        if given is None:
            return None
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or given < 0:
            raise DataError(f"{self._file}: {what} is {_short(given)}; expected seconds, or leave it out")
        return float(given)


def read_index(root: Path) -> Index | None:
    """The `index.json` of a folder of clips; None where there is none with class names.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    file = root / "index.json"
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file} is not JSON ({error}): mend it, or remove it") from error
    return Index(file, index) if isinstance(index, dict) and "classes" in index else None


def is_colour(value: Any) -> bool:
    """Whether JSON holds a colour here: a list of red, green and blue, whole numbers from 0 to 255."""
    return (
        isinstance(value, list) and len(value) == 3 and all(type(level) is int and 0 <= level <= 255 for level in value)
    )


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."
