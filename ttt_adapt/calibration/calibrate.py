"""Calibrate a model on stills of its own ground, with or without labels: `calibrate(model, stills)`.

1. Measure: statistics and divergence of the stills at every point of the model, and the reconstruction loss.
2. Choose the rule by which frames are corrected: candidates are tried on held-out stills under synthetic drifts. The
   rule that gains most on average is taken, among those that lose at most `TOLERANCE` without a drift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt.calibration.agreement import compared, score_by
from ttt_adapt.calibration.settings import Way, choose_settings
from ttt_adapt.data.drift import Drift, parse_drift
from ttt_adapt.errors import ConfigError, warn
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.correction import correction
from ttt_adapt.model.frames import Preprocess
from ttt_adapt.model.measure import LEAST_STILLS, TakenStills, measure, take_stills, with_drifts
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.probe import evaluating
from ttt_adapt.model.rule import Rule
from ttt_adapt.model.wrappers import check_module, unwrapped
from ttt_adapt.objectives.check_objective import check_attached
from ttt_adapt.objectives.mae import MAEBranch

DRIFTS = ("night", "noise", "fog", "rain", "blur", "jpeg")
"""What a rule is chosen on, at severity 3."""
TOLERANCE = {"labels": 0.005, "agreement": 0.01}
"""The largest relative loss without a drift that a rule may have: of the score by labels, and of the agreement with the
plain model, which counts every change as a loss."""
LEAST_TO_CHOOSE = 2 * LEAST_STILLS
"""With fewer stills there are not enough to measure on beside those that are held out: the default rule is taken."""
HELD_OUT = 12
"""Stills that rules are compared on, at most; they are spread over all stills, and not measured meanwhile."""
PANS = 3
"""Stills among them that become short streams."""


def candidates(kinds: Iterable[str]) -> list[Rule]:
    """The rules that are tried for a model with these kinds of points."""
    ways = (("layer", "mean", 1.0), ("layer", "high", 1.0), ("channel", "mean", 1.0))
    more = ("channel", "high", 1.0) if "batchnorm" in kinds else ("layer", "high", 1.5)
    inside = ["batchnorm"] if "batchnorm" in kinds else [kind for kind in ("norms", "blocks") if kind in kinds]
    places = [*inside, *(f"input+{kind}" for kind in inside)] if "input" in kinds else inside
    alone = [Rule("input")] if "input" in kinds else []
    return [*(Rule(points, *way) for points in places for way in (*ways, more)), *alone]


def calibrate(
    model: nn.Module,
    stills: Iterable[Any],
    labels: Iterable[Any] | None = None,
    *,
    branch: MAEBranch | None = None,
    preprocess: Preprocess | None = None,
    predict: Callable[..., Any] | None = None,
    choose: bool = True,
    steps: bool = False,
    drifts: Sequence[str] | str = DRIFTS,
    ignore: int = 255,
    distribution: bool | None = None,
    seed: int = 0,
) -> Calibration:
    """Describe a model on its own ground, and choose how frames that are far from it are corrected.

    The model is not changed. It takes seconds for a small model: some 80 passes to measure, and for the choice some 80
    for each of a few candidates.

    Args:
        model: the trained model.
        stills: at least 8 frames of one size, as `StreamAdapter.step` takes them, better some 40: ordinary scenes in
            ordinary weather, of the camera that the model will see. A choice needs at least 16, and uint8.
        labels: class ids [H, W] of every still, for models that return class scores; without labels, a rule is good
            that keeps the predictions of a drifted still near those of the clean one.
        branch: on this model; its loss is measured too, and the calibration becomes `branch.calibration`.
        preprocess: as in `StreamAdapter`.
        predict: as in `StreamAdapter`.
        choose: choose the rule; False: take the default.
        steps: choose too how gradient steps are taken (`ttt_adapt.calibration.settings`). It needs a branch and
            `choose`, and takes as long as some 200 frames of a stream for each of five candidates.
        drifts: what to choose on, as `ttt_adapt.data.drift.parse_drift` reads it.
        ignore: label id of pixels that do not count.
        distribution: whether the model's output is class scores, for a choice without labels; None: it is where it has
            at least 4 channels.
        seed: of drifts and masks.

    Raises:
        ConfigError: too few stills, labels that do not fit, an unknown drift, a model without any point to measure
            at, or `steps` without what it needs; nothing has changed.
        FrameError, FrameTypeError: a still cannot be used.
        StateError: the model has a StreamAdapter, so its weights may be others than its own.
    """
    check_module(model)
    chosen_on = [parse_drift(text, seed) for text in (drifts.split(",") if isinstance(drifts, str) else drifts)]
    if branch is not None:
        check_attached(model, branch)
        predict = model if predict is None and unwrapped(model) is not unwrapped(branch.model) else predict
    model = unwrapped(model if branch is None else branch.model)
    taken = take_stills(model, stills, preprocess)
    truth = None if labels is None else list(labels)
    if truth is not None and len(truth) != len(taken):
        raise ConfigError(
            f"got {len(truth)} label{'s' * (len(truth) != 1)} for {len(taken)} stills; expected one for each"
        )
    hindrance = _no_choice(taken, choose)
    if steps:
        _check_steps(branch, hindrance)
    way = Way(preprocess, predict, ignore, distribution, seed)
    found = measure(model, taken, predict) if branch is None else branch.measured(taken, predict, seed)
    if not hindrance:
        trial = _Trial(model, taken, truth, chosen_on, way)
        rule, record = trial.best(candidates(found.statistics))
        found = found.replace(rule=rule, record=record)
        if steps:
            assert branch is not None
            settings, rows = choose_settings(branch, with_drifts(model, found, taken, predict), *trial.pans(), way)
            found = found.replace(settings=settings, record={**record, "settings": rows})
    found = with_drifts(model, found, taken, predict)
    if branch is not None:
        branch.calibration = found
    if not hindrance and found.rule.largest == 0.0:
        warn(
            "no rule helped on the held-out stills, so this calibration corrects no frame; calibration.record has what "
            "was tried"
        )
    return found


def _no_choice(stills: TakenStills, choose: bool) -> str:
    """Why a rule is not chosen; "" if it can be."""
    if not choose:
        return "choose is False"
    if len(stills) < LEAST_TO_CHOOSE:
        return f"there are fewer than {LEAST_TO_CHOOSE} stills"
    if not all(getattr(frame, "dtype", None) in (np.uint8, torch.uint8) for frame in stills.frames):
        return "the stills are not uint8, which drifts are made of"
    return ""


def _check_steps(branch: MAEBranch | None, hindrance: str) -> None:
    """Raises ConfigError where settings of gradient steps cannot be chosen."""
    if branch is None:
        raise ConfigError("steps=True chooses how gradient steps are taken, and there is no branch: pass branch=")
    if hindrance:
        raise ConfigError(
            f"steps=True compares settings under drifts, and {hindrance}: change that, or leave steps out"
        )


class _Trial:
    """Candidates on held-out stills, clean and under drifts; measured on the other stills."""

    def __init__(
        self, model: nn.Module, taken: TakenStills, labels: Sequence[Any] | None, drifts: Sequence[Drift], way: Way
    ) -> None:
        self._model, self._way, self._drifts = model, way, drifts
        self._passes = PassState(model)
        count = min(HELD_OUT, len(taken) // 2)
        held = [int((i + 0.5) * len(taken) / count) for i in range(count)]
        self._pictures = [_picture(taken.frames[i]) for i in held]
        self._labels = None if labels is None else [labels[i] for i in held]
        self._measured = measure(model, taken.at([i for i in range(len(taken)) if i not in held]), way.predict)
        self._sets = {"none": taken.at(held)}
        for drift in drifts:
            pictures = [drift.apply(picture, i) for i, picture in enumerate(self._pictures)]
            self._sets[str(drift)] = take_stills(model, pictures, way.preprocess, least=1)
        self._score = score_by(self._outputs("none", None), self._labels, way.ignore, way.distribution)
        self._plain = {name: self._score(self._outputs(name, None)) for name in self._sets}

    @property
    def _by(self) -> str:
        return "agreement" if self._labels is None else "labels"

    def best(self, rules: Sequence[Rule]) -> tuple[Rule, dict[str, Any]]:
        """The best rule, or one that only measures where none helps, and the scores of all."""
        rows: list[dict[str, Any]] = [{"rule": "fixed", "gain": 0.0, "loss": 0.0, "scores": self._plain}]
        best, most = dataclasses.replace(self._measured.rule, largest=0.0), 0.0
        for rule in rules:
            scores = {name: self._score(self._outputs(name, rule)) for name in self._sets}
            gain, loss = compared(self._plain, scores)
            rows.append({"rule": vars(rule), "gain": gain, "loss": loss, "scores": scores})
            if gain > most and loss <= TOLERANCE[self._by]:
                best, most = rule, gain
        return best, {"by": self._by, "tolerance": TOLERANCE[self._by], "candidates": rows}

    def pans(self) -> tuple[list[np.ndarray], list[Any] | None, Sequence[Drift], float]:
        """Some of the held-out stills, their labels, the drifts, and the tolerance, for a choice of settings."""
        places = range(0, len(self._pictures), max(len(self._pictures) // PANS, 1))[:PANS]
        labels = None if self._labels is None else [self._labels[i] for i in places]
        return [self._pictures[i] for i in places], labels, self._drifts, TOLERANCE[self._by]

    def _outputs(self, name: str, rule: Rule | None) -> Iterator[Any]:
        """The outputs for a set of stills, one after the other."""
        predict = self._model if self._way.predict is None else self._way.predict
        found = self._measured if rule is None else self._measured.replace(rule=rule)
        corrected = None if rule is None else correction(self._model, found)
        for still in self._sets[name]:
            around = nullcontext() if corrected is None else corrected.active()
            with self._passes.kept(), evaluating(self._model), torch.inference_mode(False), torch.no_grad(), around:
                output = predict(still.x, *still.context)
            yield output


def _picture(frame: Any) -> np.ndarray:
    """A uint8 frame as an array."""
    return frame.cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
