"""Calibrate a model on stills of its own ground, with or without labels: `calibrate(model, stills)`.

1. Measure: statistics and divergence of the stills at every point of the model, and the reconstruction loss.
2. Choose the rule by which frames are corrected: candidates are tried on held-out stills under synthetic drifts. The
   rule that gains most on average is taken, among those that lose at most `TOLERANCE` without a drift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ttt_adapt.calibration.agreement import agreement_with
from ttt_adapt.calibration.settings import choose_settings
from ttt_adapt.data.drift import Drift, parse_drift
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.calibration import Calibration, Rule
from ttt_adapt.model.correction import correction
from ttt_adapt.model.frames import Preprocess, TakenFrame
from ttt_adapt.model.measure import measure, take_stills
from ttt_adapt.model.probe import evaluating
from ttt_adapt.objectives.mae import MAEBranch

DRIFTS = ("night", "noise", "fog", "rain", "blur", "jpeg")
"""What a rule is chosen on, at severity 3."""
TOLERANCE = {"labels": 0.005, "agreement": 0.01}
"""The largest relative loss without a drift that a rule may have: of the score by labels, and of the agreement with the
plain model, which counts every change as a loss."""
HELD_OUT = 12
"""Stills that rules are compared on."""
PANS = 3
"""Stills among them that become short streams."""


def candidates(kinds: Iterable[str]) -> list[Rule]:
    """The rules that are tried for a model with these kinds of points."""
    if "batchnorm" in kinds:
        return [Rule("batchnorm", per, margin) for per in ("layer", "channel") for margin in ("mean", "high")]
    places = [kind for kind in ("norms", "blocks") if kind in kinds]
    places = [*places, *(f"input+{kind}" for kind in places), "input"] if "input" in kinds else places
    ways = (("layer", "mean"), ("layer", "high"), ("channel", "mean"))
    return [Rule(points, per, margin) for points in places for per, margin in ways]


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
    drifts: Sequence[str] = DRIFTS,
    ignore: int = 255,
    seed: int = 0,
) -> Calibration:
    """Describe a model on its own ground, and choose how frames that are far from it are corrected.

    The model is not changed. It takes seconds for a small model: some 40 passes to measure, and for the choice some 80
    for each of a few candidates.

    Args:
        model: the trained model.
        stills: at least 8 frames of one size, as `StreamAdapter.step` takes them, better some 40: ordinary scenes in
            ordinary weather, of the camera that the model will see. They have to be uint8 for a choice.
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
        seed: of drifts and masks.

    Raises:
        ConfigError: too few stills, labels that do not fit, an unknown drift, a model without any point to measure
            at, or `steps` without what it needs; nothing has changed.
        FrameError, FrameTypeError: a still cannot be used.
    """
    chosen = [parse_drift(text, seed) for text in drifts]
    if branch is not None and branch.model is not model:
        raise ConfigError("the branch is attached to another model: attach one to this model")
    frames = list(stills)
    taken = take_stills(model, frames, preprocess)
    truth = None if labels is None else list(labels)
    if truth is not None and len(truth) != len(frames):
        raise ConfigError(f"got {len(truth)} labels for {len(frames)} stills; expected one for each")
    drift = all(_can_drift(frame) for frame in frames)
    if steps:
        _check_steps(branch, choose, drift)
    choose = choose and drift
    if branch is not None:
        before = branch.calibration
        found = branch.calibrate(frames, preprocess=preprocess, predict=predict, seed=seed)
        branch.calibration = before  # until a rule is chosen
    else:
        found = measure(model, taken, predict)
    if choose:
        trial = _Trial(model, frames, taken, truth, chosen, preprocess, predict, ignore)
        rule, record = trial.best(candidates(found.statistics))
        found = found.replace(rule=rule, record=record)
        if steps:
            assert branch is not None
            found = _with_settings(found, trial, branch, preprocess, predict, ignore, seed)
    if branch is not None:
        branch.calibration = found
    return found


def _check_steps(branch: MAEBranch | None, choose: bool, drift: bool) -> None:
    """Raises ConfigError where settings of gradient steps cannot be chosen."""
    if branch is None:
        raise ConfigError("steps=True chooses how gradient steps are taken, and there is no branch: pass branch=")
    if not choose or not drift:
        why = "choose is False" if not choose else "the stills are not uint8, which drifts are made of"
        raise ConfigError(f"steps=True compares settings under drifts, and {why}: change that, or leave steps out")


def _with_settings(
    found: Calibration,
    trial: _Trial,
    branch: MAEBranch,
    preprocess: Preprocess | None,
    predict: Callable[..., Any] | None,
    ignore: int,
    seed: int,
) -> Calibration:
    """The calibration with the settings of gradient steps that suit the model."""
    settings, rows = choose_settings(
        branch,
        found,
        trial.pictures[:PANS],
        None if trial.labels is None else trial.labels[:PANS],
        trial.drifts,
        TOLERANCE["agreement" if trial.labels is None else "labels"],
        preprocess=preprocess,
        predict=predict,
        ignore=ignore,
        seed=seed,
    )
    return found.replace(settings=settings, record={**found.record, "settings": rows})


class _Trial:
    """Candidates on held-out stills, clean and under drifts; measured on the other stills."""

    def __init__(
        self,
        model: nn.Module,
        frames: Sequence[Any],
        taken: Sequence[TakenFrame],
        labels: Sequence[Any] | None,
        drifts: Sequence[Drift],
        preprocess: Preprocess | None,
        predict: Callable[..., Any] | None,
        ignore: int,
    ) -> None:
        self._model, self._call = model, model if predict is None else predict
        held = list(range(1, len(frames), 2))
        held = held[:: max(len(held) // HELD_OUT, 1)][:HELD_OUT]
        self.pictures = [np.asarray(frames[i]) for i in held]
        self.labels = None if labels is None else [labels[i] for i in held]
        self.drifts = drifts
        self._measured = measure(model, [still for i, still in enumerate(taken) if i not in held], predict)
        sets: dict[str, list[TakenFrame]] = {"none": [taken[i] for i in held]}
        for drift in drifts:
            pictures = [drift.apply(picture, i) for i, picture in enumerate(self.pictures)]
            sets[str(drift)] = take_stills(model, pictures, preprocess, least=1)
        self._sets = sets
        plain = {name: self._outputs(still, None) for name, still in sets.items()}
        self._score = own = agreement_with(plain["none"], self.labels, ignore)
        self._by = "agreement" if labels is None else "labels"
        self._plain = {name: own(outputs) for name, outputs in plain.items()}

    def best(self, rules: Sequence[Rule]) -> tuple[Rule, dict[str, Any]]:
        """The best rule, and the scores of all."""
        rows: list[dict[str, Any]] = [{"rule": "fixed", "gain": 0.0, "loss": 0.0, "scores": self._plain}]
        best, most = dataclasses.replace(rules[0], largest=0.0), 0.0  # measures, and corrects nothing
        for rule in rules:
            scores = {name: self._score(self._outputs(stills, rule)) for name, stills in self._sets.items()}
            relative = {name: scores[name] / max(self._plain[name], 1e-9) - 1.0 for name in scores}
            gain = float(np.mean([value for name, value in relative.items() if name != "none"]))
            rows.append({"rule": vars(rule), "gain": gain, "loss": -relative["none"], "scores": scores})
            if gain > most and -relative["none"] <= TOLERANCE[self._by]:
                best, most = rule, gain
        return best, {"by": self._by, "tolerance": TOLERANCE[self._by], "candidates": rows}

    def _outputs(self, stills: Sequence[TakenFrame], rule: Rule | None) -> list[Any]:
        found = self._measured if rule is None else self._measured.replace(rule=rule)
        corrected = nullcontext() if rule is None else correction(self._model, found).active()
        with evaluating(self._model), torch.inference_mode(False), torch.no_grad(), corrected:
            return [self._call(still.x, *still.context) for still in stills]


def _can_drift(frame: Any) -> bool:
    """Whether a frame is uint8, which drifts are made of."""
    return getattr(frame, "dtype", None) in (np.uint8, torch.uint8)
