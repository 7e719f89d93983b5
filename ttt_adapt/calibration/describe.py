"""A calibration in words: for `ttt-adapt calibrate`, `info` and `run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from torch import nn

from ttt_adapt.calibration.calibrate import LEAST_TO_CHOOSE
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.rule import Rule

FAR = 0.11
"""Stills whose `Calibration.distance` is larger look unlike the data that the model was trained on.

A network that was trained on the daylight of CamVid finds 0.06 to 0.09 for its daylight clips, 0.13 for dusk and fog,
0.17 to 0.42 for other cameras, 0.7 for night and 1.1 for noise.
"""

_WHERE = {
    "batchnorm": "at the input of every BatchNorm",
    "norms": "at the output of every norm that is no BatchNorm",
    "blocks": "at the output of every block",
}
_KINDS = {
    "batchnorm": "BatchNorm inputs",
    "norms": "outputs of other norms",
    "blocks": "outputs of blocks",
    "input": "tones of the image",
}
_USUAL = {"mean": "stills do on average", "high": "95 % of the stills do"}
_BEYOND = {"mean": "the mean still", "high": "95 % of the stills"}


class TriedSettings(NamedTuple):
    """Settings of gradient steps that were tried.

    Attributes:
        words: what they are; "the fixed model" is the model without calibration and gradient steps.
        gain: mean relative gain of the score under the drifts, over the fixed model.
        loss: relative loss of the score without a drift.
        chosen: whether the calibration has them.
    """

    words: str
    gain: float
    loss: float
    chosen: bool


class Candidate(NamedTuple):
    """A rule that was tried.

    Attributes:
        rule: `Rule("none")` is the model as it is.
        gain: mean relative gain of the score under the drifts.
        loss: relative loss of the score without a drift.
        chosen: whether it is the rule of the calibration.
    """

    rule: Rule
    gain: float
    loss: float
    chosen: bool


def corrects(rule: Rule) -> bool:
    """Whether a rule changes any frame."""
    return rule.points != "none" and rule.largest > 0


def describe_rule(rule: Rule) -> str:
    """How frames are corrected, in words."""
    if not corrects(rule):
        return "no frame is corrected"
    more = "more than" if rule.strength == 1 else f"more than {rule.strength:g} times what"
    parts = []
    if inside := [kind for kind in rule.kinds if kind != "input"]:
        per = "one share per layer" if rule.per == "layer" else "one share per channel"
        where = " and ".join(_WHERE[kind] for kind in inside)
        share = f"gets up to {rule.largest:.0%} of its own statistics, {per}"
        parts.append(f"{where}, a frame that differs {more} {_USUAL[rule.margin]} {share}")
    if "input" in rule.kinds:
        per = "for all channels together" if rule.per == "layer" else "channel by channel"
        way = f"moves up to {rule.largest:.0%} of the way to the stills' tones, {per}"
        parts.append(f"an image whose tones differ {more} {_USUAL[rule.at_image().margin]} {way}")
    return "; ".join(parts)


def candidates_of(calibration: Calibration) -> list[Candidate]:
    """The rules that were tried, the best first, with the model as it is among them; [] where nothing was chosen."""
    found = []
    for row in calibration.record.get("candidates", ()):
        rule = _rule_of(row["rule"])
        chosen = rule == calibration.rule or not (corrects(rule) or corrects(calibration.rule))
        found.append(Candidate(rule, float(row["gain"]), float(row["loss"]), chosen))
    return sorted(found, key=lambda each: -each.gain)


def tried_settings(calibration: Calibration) -> list[TriedSettings]:
    """The settings that were tried, the best first, with the fixed model among them; [] where nothing was chosen."""
    found = []
    for row in calibration.record.get("settings", ()):
        settings = row["settings"]
        words = _settings_in_words(settings) if isinstance(settings, Mapping) else "the fixed model"
        found.append(
            TriedSettings(words, float(row["gain"]), float(row["loss"]), settings == dict(calibration.settings))
        )
    return sorted(found, key=lambda each: -each.gain)


def in_columns(rule: Rule) -> tuple[str, str, str]:
    """A rule for a table: where it corrects, for what frames, and by how much."""
    if not corrects(rule):
        return "nowhere: the model as it is", "", ""
    usual = [_BEYOND[rule.at_image().margin]] if "input" in rule.kinds else []
    if rule.kinds != ["input"]:
        usual.append(_BEYOND[rule.margin])
    beyond = " + ".join(usual) if rule.strength == 1 else f"{rule.strength:g} x {' + '.join(usual)}"
    return " + ".join(_KINDS[kind] for kind in rule.kinds), beyond, f"{rule.largest:.0%} per {rule.per}"


def drifts_of(calibration: Calibration) -> list[str]:
    """The drifts that the rule was chosen on; [] where nothing was chosen."""
    rows = calibration.record.get("candidates", ())
    return [name for name in rows[0].get("scores", {}) if name != "none"] if rows else []


def is_far(calibration: Calibration) -> bool:
    """Whether the stills look unlike the data that the model was trained on; only BatchNorm can tell."""
    return calibration.distance is not None and calibration.distance > FAR


def describe_distance(calibration: Calibration) -> str:
    """How far the stills are from the training data, in words."""
    if calibration.distance is None:
        return "unknown: only a model with BatchNorm keeps statistics of its training data"
    found = f"{calibration.distance:.2f} from the running statistics of BatchNorm"
    if not is_far(calibration):
        return f"{found}: near (up to {FAR:g})"
    return (
        f"{found}: far (more than {FAR:g}), these stills look unlike the data that the model was trained on. That is "
        "usual for another camera or place; if they show night or bad weather, take others"
    )


def describe_calibration(calibration: Calibration, model: nn.Module) -> list[tuple[str, str]]:
    """A calibration as pairs of a name and a value, as text for people.

    Args:
        calibration: what is shown.
        model: whose weights it is compared with.
    """
    height, width = calibration.size
    measured = [f"{len(points)} {_KINDS.get(kind, kind)}" for kind, points in calibration.statistics.items()]
    rows = [
        ("calibration", f"{calibration.stills} stills of {height} x {width}, {_fits(calibration, model)}"),
        ("measured at", ", ".join(measured)),
        ("corrected", describe_rule(calibration.rule)),
        ("chosen", _choice(calibration)),
        ("settings", _settings(calibration)),
        ("stills' distance", describe_distance(calibration)),
    ]
    if calibration.loss is not None:
        rows.append(("stills' loss", "{:.4f} ± {:.4f} of the reconstruction".format(*calibration.loss)))
    return rows


def _fits(calibration: Calibration, model: nn.Module) -> str:
    try:
        calibration.check(model)
    except ConfigError:
        return "but of OTHER WEIGHTS than these: calibrate this model again"
    return "of these weights"


def _choice(calibration: Calibration) -> str:
    """How the rule was chosen, and what it gained."""
    tried = candidates_of(calibration)
    if not tried:
        few = calibration.stills < LEAST_TO_CHOOSE
        why = f": a choice needs at least {LEAST_TO_CHOOSE} stills" if few else ""
        return f"not chosen, so it is the default rule{why}"
    by = "their labels" if calibration.record.get("by") == "labels" else "how little drifts move the predictions"
    on = f"by {by}, on {', '.join(drifts_of(calibration))}"
    if not corrects(calibration.rule):
        return f"{on}: no rule gained"
    taken = next((each for each in tried if each.chosen), None)
    return on if taken is None else f"{on}: {taken.gain:+.1%} under drifts, {-taken.loss:+.1%} without"


def _settings(calibration: Calibration) -> str:
    """The settings that were chosen for gradient steps, and what they gained."""
    if not calibration.settings:
        return "those of the preset"
    words = _settings_in_words(calibration.settings)
    taken = next((each for each in tried_settings(calibration) if each.chosen), None)
    return words if taken is None else f"{words}: {taken.gain:+.1%} under drifts, {-taken.loss:+.1%} without"


def _settings_in_words(settings: Mapping[str, Any]) -> str:
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"{words} (no gradient step)" if settings.get("iterations") == 0 else words


def _rule_of(saved: Any) -> Rule:
    """The rule that a record holds."""
    if not isinstance(saved, Mapping):
        return Rule("none")
    return Rule(**{each.name: saved[each.name] for each in fields(Rule) if each.name in saved})
