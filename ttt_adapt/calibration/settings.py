"""Choose how a calibrated model takes gradient steps: on short streams made of stills, under drifts and without.

The candidates run through `StreamAdapter`, as a user's stream does. The one that gains most over the fixed model, on
average over the drifts, is taken, among those that lose at most the tolerance without a drift. "No gradient step" is
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.calibration.agreement import compared, score_by
from ttt_adapt.calibration.pans import pan
from ttt_adapt.config import StreamConfig
from ttt_adapt.data.drift import Drift
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.frames import Preprocess
from ttt_adapt.model.measure import take_stills
from ttt_adapt.model.probe import evaluating
from ttt_adapt.model.wrappers import unwrapped
from ttt_adapt.objectives.mae import MAEBranch

FRAMES = 8
"""Frames of the pan over one still."""

CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"iterations": 0},
    {"lr": 1e-4, "source_pull": 0.5},
    {"lr": 1e-4, "source_pull": 0.1},
    {"lr": 1e-4, "source_pull": 0.02},
    {"lr": 1e-4, "source_pull": 0.02, "gate": "calibrated"},
)
"""Settings that are compared."""


@dataclass(frozen=True)
class Way:
    """How a model is run and scored while something is chosen for it.

    Attributes:
        preprocess: as in `StreamAdapter`.
        predict: as in `StreamAdapter`.
        ignore: label id of pixels that do not count.
        distribution: whether outputs are class scores, see `ttt_adapt.calibration.agreement.score_by`.
        seed: of streams.
    """

    preprocess: Preprocess | None = None
    predict: Callable[..., Any] | None = None
    ignore: int = 255
    distribution: bool | None = None
    seed: int = 0


def choose_settings(
    branch: MAEBranch,
    calibration: Calibration,
    stills: Sequence[np.ndarray],
    labels: Sequence[Any] | None,
    drifts: Sequence[Drift],
    tolerance: float,
    way: Way,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best of `CANDIDATES` for this model, and the scores of all.

    Args:
        branch: on the model.
        calibration: of the model.
        stills: uint8 [H, W, 3] each; one pan is made of each.
        labels: class ids [H, W] of each; None: the fixed model's predictions on the clean pans stand in for them.
        drifts: what the pans are put under.
        tolerance: the largest relative loss without a drift.
        way: how the model is run and scored.
    """
    model = unwrapped(branch.model)
    passes = branch.pass_state
    moving = [pan(still, None if labels is None else labels[i], FRAMES) for i, still in enumerate(stills)]
    frames, truth = zip(*(each for one in moving for each in one), strict=True)
    streams = {"none": list(frames)}
    streams |= {str(drift): [drift.apply(frame, i) for i, frame in enumerate(frames)] for drift in drifts}

    def fixed(pictures: Sequence[np.ndarray]) -> Iterator[Any]:
        call = model if way.predict is None else way.predict
        for still in take_stills(model, pictures, way.preprocess, least=1):
            with passes.kept(), evaluating(model), torch.inference_mode(False), torch.no_grad():
                output = call(still.x, *still.context)
            yield output

    def adapted(pictures: Sequence[np.ndarray], settings: Mapping[str, Any]) -> float:
        config = StreamConfig.online(**{"seed": way.seed, **settings})
        with StreamAdapter(
            model, branch, config=config, calibration=calibration, preprocess=way.preprocess, predict=way.predict
        ) as adapter:
            return score(adapter.stream(pictures))

    score = score_by(fixed(streams["none"]), None if labels is None else truth, way.ignore, way.distribution)
    before = {name: score(fixed(pictures)) for name, pictures in streams.items()}
    rows: list[dict[str, Any]] = []
    for settings in CANDIDATES:
        after = {name: adapted(pictures, settings) for name, pictures in streams.items()}
        gain, loss = compared(before, after)
        rows.append({"settings": dict(settings), "gain": gain, "loss": loss, "scores": after})
    allowed = [row for row in rows if row["loss"] <= tolerance] or rows[:1]
    best = max(allowed, key=lambda row: row["gain"])
    return dict(best["settings"]), [{"settings": "fixed", "gain": 0.0, "loss": 0.0, "scores": before}, *rows]
