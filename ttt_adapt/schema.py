"""What the fields of a saved file may hold: checked before anything is made of them.

A check is a function that takes a value and returns "" where it fits, and otherwise what was expected, in words.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ttt_adapt.errors import CheckpointError, TTTAdaptError

Check = Callable[[Any], str]

DEPTH = 24
"""How deep saved plain values may be nested."""
WHOLE = 2**53
"""Whole numbers beyond it are no counts, sizes or positions."""


def whole(low: int = 0, high: int = WHOLE) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"a whole number from {low} to {high}"

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number from `low` to `high`."""

    def check(value: Any) -> str:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        between = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
        return "" if fits and math.isfinite(_float(value)) else f"a finite number{between}"

    return check


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number with hundreds of digits
        return math.inf


def flag(value: Any) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else "True or False"


def text(value: Any) -> str:
    """Text that can be written in UTF-8."""
    try:
        return "" if isinstance(value, str) and value.encode() is not None else "text"
    except UnicodeEncodeError:
        return "text without lone surrogates"


def one_of(*choices: str) -> Check:
    """One of these texts."""
    return lambda value: "" if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"


def optional(check: Check) -> Check:
    """None, or what fits `check`."""

    def either(value: Any) -> str:
        expected = "" if value is None else check(value)
        return expected and f"None, or {expected}"

    return either


def list_of(check: Check, least: int = 0, most: int = WHOLE) -> Check:
    """A list or tuple of `least` to `most` values that fit `check`."""

    def every(value: Any) -> str:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            count = f"{least}" if least == most else f"at least {least}" if most == WHOLE else f"{least} to {most}"
            return f"a list of {count} values" if (least, most) != (0, WHOLE) else "a list"
        expected = next(filter(None, map(check, value)), "")
        return expected and f"a list, each of its values {expected}"

    return every


def dict_of(check: Check, names: Collection[str] | None = None) -> Check:
    """A dict with text as keys, and values that fit `check`; with `names`, other keys do not fit."""

    def every(value: Any) -> str:
        if not isinstance(value, Mapping) or any(text(key) for key in value):
            return "a dict with names as keys"
        if names is not None and (other := [key for key in value if key not in names]):
            return f"a dict with names of {', '.join(names)}, not {shown(other[0])}"
        for key, item in value.items():
            if expected := check(item):
                return f"a dict, its {shown(key)} {expected}"
        return ""

    return every


def plain(value: Any) -> str:
    """Nested lists and dicts of text, numbers, True, False and None."""
    level = [value]
    for _ in range(DEPTH):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if any(text(key) for key in item):
                    return "dicts with names as keys"
                inside += item.values()
            elif isinstance(item, list | tuple):
                inside += item
            elif not _is_scalar(item):
                return "plain values: text, numbers, True, False, None, lists and dicts"
        level = inside
        if not level:
            return ""
    return f"plain values, nested at most {DEPTH} deep"


def _is_scalar(item: Any) -> bool:
    """Whether a value is None, True, False, text or a number; no whole number has more digits than can be shown."""
    return item is None or isinstance(item, bool | float) or not text(item) or not whole(-(2**64), 2**64)(item)


def check_fields(
    values: Any,
    fields: Mapping[str, Check],
    what: str,
    *,
    required: Collection[str] | None = None,
    others: bool = False,
    error: type[TTTAdaptError] = CheckpointError,
) -> None:
    """Check a dict of saved values.

    Args:
        values: what was read.
        fields: name -> check.
        what: what it is of, for the message.
        required: names that have to be there; None: all.
        others: whether other names may be there, whatever they hold.
        error: what to raise.

    Raises:
        `error`: it is no dict, a name is missing or unknown, or a value does not fit.
    """
    if not isinstance(values, Mapping):
        raise error(f"{what} is {shown(values)}; expected a dict with {', '.join(fields)}")
    needed = fields if required is None else required
    if missing := [name for name in needed if name not in values]:
        raise error(f"{what} lacks {', '.join(missing)}")
    if not others and (unknown := [name for name in values if name not in fields]):
        raise error(f"{what} has {', '.join(map(shown, unknown[:3]))}, which this version of ttt_adapt does not know")
    for name, check in fields.items():
        if name in values and (expected := check(values[name])):
            raise error(f"{what} has {shown(values[name])} as {name}; expected {expected}")


def read_json(content: str | bytes, what: str, error: type[TTTAdaptError] = CheckpointError) -> Any:
    """The value of a JSON text.

    Raises:
        `error`: it is none, is nested too deep, or has a name twice in one dict.
    """
    try:
        return json.loads(content, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as reason:
        raise error(f"{what} is not JSON: {shown(str(reason))}") from reason


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of names and values; a name that stands twice is refused, because either value may be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one dict")
    return found


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    try:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"a tensor {tuple(value.shape)} of {value.dtype}"
        return _SHORT.repr(value)
    except Exception:  # the digits of a whole number, a nested tensor, or a class of somebody else
        return f"a {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlevel = 3
