"""What the file of a calibration may hold, checked before a `Calibration` is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.files import check_format_number
from ttt_adapt.model.points import KINDS
from ttt_adapt.model.rule import Rule
from ttt_adapt.model.tone import LEVELS
from ttt_adapt.schema import (
    check_fields,
    dict_of,
    list_of,
    number,
    one_of,
    optional,
    plain,
    read_json,
    shown,
    text,
    whole,
)

FORMAT = 2
"""Number of the layout of saved calibrations. In format 1 the image had a mean per channel in place of its levels."""
OUTDATED = "has a calibration of an earlier version, without the levels of the image"
TENSORS = ("mean", "std", "usual", "high", "layer_usual", "layer_high", "layer_shift")
"""The fields of `PointStatistics` that are tensors."""


def read_saved(content: str, tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The plain values that `Calibration.to_json` wrote, without their format.

    Args:
        content: JSON.
        tensors: what `Calibration.tensors` gave.
        source: where both were read from, for messages.

    Raises:
        CheckpointError: they are none, do not belong together, or a later version wrote them.
    """
    values = read_json(content, source)
    if isinstance(values, Mapping) and "format" in values:
        check_format_number(values["format"], FORMAT, source)
        if values["format"] < FORMAT:
            raise CheckpointError(f"{source} {OUTDATED}: calibrate the model again")
    check_fields(values, _FIELDS, source, required=_FIELDS.keys() - {"rounded"})
    check_tensors(values["places"], tensors, source)
    return {name: value for name, value in values.items() if name != "format"}


def is_outdated(content: str, source: str) -> bool:
    """Whether this is a calibration of an earlier version, which cannot be used and is best made again."""
    values = read_json(content, source)
    return isinstance(values, Mapping) and not whole(1, FORMAT - 1)(values.get("format"))


def _places(value: Any) -> str:
    """Kind of points -> name -> layout and number of prefix tokens."""
    place = list_of(lambda item: one_of("nchw", "nhwc", "tokens")(item) and whole(0, 2**16)(item), 2, 2)
    return dict_of(dict_of(place), KINDS)(value) or _mixed(value)


def _rule(value: Any) -> str:
    """The fields of a `Rule`, of the kinds of their defaults; what they mean is checked when it is made."""
    kinds = {each.name: number() if isinstance(each.default, float) else text for each in fields(Rule)}
    if expected := dict_of(lambda _value: "", kinds)(value):
        return expected
    return next((f"{name} as {expected}" for name, item in value.items() if (expected := kinds[name](item))), "")


def _mixed(value: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether every place has a layout first, and then a number."""
    places = [place for points in value.values() for place in points.values()]
    return "" if all(isinstance(a, str) and isinstance(b, int) for a, b in places) else "layouts and numbers of tokens"


_FIELDS = {
    "format": whole(1, FORMAT),
    "rule": _rule,
    "fingerprint": text,
    "rounded": text,
    "stills": whole(1),
    "size": list_of(whole(1), 2, 2),
    "drifts": list_of(number(0.0)),
    "loss": optional(list_of(number(), 2, 2)),
    "settings": dict_of(plain),
    "record": dict_of(plain),
    "places": _places,
}
"""What `Calibration.to_json` writes. The first files of this format are without `rounded`, and are as good."""


def check_tensors(places: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are not those of the points: vectors of one length, levels, and numbers for the layer.

    Raises:
        CheckpointError: one is missing, of another shape or kind, not finite, or of no point.
    """
    names = {f"{kind}/{name}" for kind, points in places.items() for name in points}
    expected = {f"{name}/{part}" for name in names for part in TENSORS}
    if other := sorted(expected ^ tensors.keys()):
        raise CheckpointError(f"{source} lacks {shown(other[0])}, or has it for no point of its own")
    for name in names:
        parts = {part: tensors[f"{name}/{part}"] for part in TENSORS}
        count = parts["std"].numel()
        for part, tensor in parts.items():
            shape: tuple[int, ...] = () if part.startswith("layer_") else (count,)
            if part == "mean" and name.startswith("input/"):
                shape = (count, LEVELS)
            sound = tensor.is_floating_point() and tensor.element_size() > 1 and bool(tensor.isfinite().all())
            if not sound or tuple(tensor.shape) != shape or not count or (part != "mean" and bool((tensor < 0).any())):
                raise CheckpointError(
                    f"{source} has {shown(tensor)} as {shown(f'{name}/{part}')}; expected finite numbers, {shape}, "
                    "that are not below 0 (but for means)"
                )
        if name.startswith("input/") and bool((parts["mean"].diff(dim=-1) < 0).any()):
            raise CheckpointError(
                f"{source} has levels that descend as {shown(f'{name}/mean')}; expected ascending ones"
            )
