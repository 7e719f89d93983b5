"""Class names and the id of void pixels, as people write them: checked, and in the order of the ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ttt_adapt.errors import DataError

MOST = 256
"""Labels are 8-bit: ids from 0 to 255."""
VOID = 255
"""The id of void pixels where the data say nothing."""
_EXPECTED = 'expected a list of names in the order of the ids, such as ["sky", "road"]'


def class_names(given: Any, where: str) -> tuple[str, ...]:
    """Class names in the order of their ids.

    Args:
        given: a list of names; a list of `{"id": 0, "name": "sky"}`; or a mapping, of ids to names or of names to ids,
            whose ids go from 0 without a gap. None and an empty list stand for no names.
        where: what they are, for messages.

    Raises:
        DataError: it is something else; a name is no text, is empty, or comes twice; or there are more than 256.
    """
    if given is None:
        return ()
    if isinstance(given, (str, bytes, set, frozenset)) or not isinstance(given, Iterable):
        kind = "text" if isinstance(given, (str, bytes)) else type(given).__name__
        raise DataError(f"{where}: the class names are {given!r}, a {kind}; {_EXPECTED}")
    names = _by_id(given, where) if isinstance(given, Mapping) else list(given)
    if names and all(isinstance(name, Mapping) for name in names):
        names = _by_id({entry.get("id"): entry.get("name") for entry in names}, where)
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: the name of class {place} is {name!r}; {_EXPECTED}")
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        places = " and ".join(str(place) for place, name in enumerate(names) if name == twice)
        raise DataError(f"{where}: the class name {twice!r} comes twice, for the ids {places}; expected each name once")
    if len(names) > MOST:
        raise DataError(
            f"{where}: there are {len(names)} class names; labels hold ids from 0 to 255, so at most {MOST} classes"
        )
    return tuple(names)


def _by_id(given: Mapping[Any, Any], where: str) -> list[Any]:
    """The names of a mapping in the order of the ids, whichever of both are its keys."""
    pairs = list(given.items())
    if pairs and all(isinstance(name, str) and _number(name) is None for name, _ in pairs):
        pairs = [(number, name) for name, number in pairs]
    known = {_number(number): name for number, name in pairs}
    if sorted(number for number in known if number is not None) != list(range(len(given))):
        ids = ", ".join(str(number) for number, _ in pairs[:6]) + (", ..." if len(pairs) > 6 else "")
        raise DataError(
            f"{where}: the ids of the class names are {ids}; expected 0 to {len(given) - 1}, each once: {_EXPECTED}"
        )
    return [known[number] for number in range(len(given))]


def _number(given: Any) -> int | None:
    """A class id, also as text, as JSON's keys are; None for everything else."""
    if isinstance(given, str) and given.strip().isdecimal():
        return int(given)
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def ignore_id(given: Any, where: str) -> int:
    """The id of void pixels; 255 for None.

    Raises:
        DataError: it is no whole number from 0 to 255.
    """
    if given is None:
        return VOID
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given not in range(256):
        raise DataError(
            f"{where}: the ignore id is {given!r}; expected a whole number from 0 to 255, the id of pixels that nobody "
            "labelled. Without one it is 255"
        )
    return int(given)
