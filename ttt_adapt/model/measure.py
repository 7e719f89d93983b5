"""Measure what a model is like on source stills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, warn
from ttt_adapt.model.calibration import Calibration, default_rule
from ttt_adapt.model.correction import correction
from ttt_adapt.model.fingerprint import fingerprint_of
from ttt_adapt.model.frames import FrameIntake, Preprocess, TakenFrame, default_preprocess
from ttt_adapt.model.hooks import hooks, uncompiled
from ttt_adapt.model.ownership import check_unowned
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.points import Point, first_tensor, points_of_pass
from ttt_adapt.model.probe import evaluating
from ttt_adapt.model.rule import PointStatistics, varies
from ttt_adapt.model.threads import in_this_thread

ALIKE = 0.15
"""Two stills are alike where they differ by less than this share of a still's own deviation, on average."""
LEAST_STILLS = 8
"""A spread that is estimated from fewer stills is worth nothing."""


def measure(
    model: nn.Module,
    stills: Sequence[TakenFrame],
    predict: Callable[..., Any] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Calibration:
    """Run the model on source stills and describe it at all its points; the model is not changed.

    Args:
        model: the trained model.
        stills: from `take_stills`.
        predict: how the model is called on one still; `model(x)` by default.
        loss: the reconstruction loss of x [1, 3, H, W]; None: it is not measured.

    Raises:
        ConfigError: the model has no point to measure at.
    """
    call = model if predict is None else predict
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
    losses, passes = [], PassState(model)
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), uncompiled():
        with passes.kept():
            kinds = points_of_pass(model, stills[0].x, lambda: call(stills[0].x, *stills[0].context))
        points = [point for kind in kinds.values() for point in kind]
        if not points:
            raise ConfigError(
                f"{type(model).__name__} has no normalisation layer, no repeated block whose output has a grid, "
                "and no convolution of the image: there is nothing to calibrate"
            )
        for still in stills:
            with passes.kept(), measuring(points) as found:
                call(still.x, *still.context)
            for name, each in found.items():
                moments.setdefault(name, []).extend(each)
            if loss is not None:
                losses.append(loss(still.x).float())
    pairs = {}  # name -> means and variances, [passes of all stills, C] each
    for name, seen in moments.items():
        means, variances = zip(*seen, strict=True)
        pairs[name] = torch.stack(means), torch.stack(variances)
    statistics = _statistics(kinds, pairs)
    height, width = stills[0].x.shape[-2:]
    spread = torch.stack(losses) if losses else None
    return Calibration(
        statistics=statistics,
        rule=default_rule(statistics),
        fingerprint=fingerprint_of(model),
        rounded=fingerprint_of(model, torch.bfloat16),
        stills=len(stills),
        size=(int(height), int(width)),
        loss=None if spread is None else (float(spread.mean()), float(spread.std())),
    )


def _statistics(
    kinds: Mapping[str, Sequence[Point]], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, dict[str, PointStatistics]]:
    """What all points are like, by kind; a point that is constant over space on every still has no scale, and none.

    Args:
        kinds: the points.
        pairs: name of a point -> means and variances of the stills.

    Raises:
        ConfigError: the model is not finite at a point, or constant at all of them.
    """
    found: dict[str, dict[str, PointStatistics]] = {}
    for kind, members in kinds.items():
        for point in members:
            if point.name not in pairs:
                continue
            means, variances = pairs[point.name]
            finite = bool(means.isfinite().all() & variances.isfinite().all())
            if finite and point.side != "statistics" and not varies(means, variances):
                continue
            statistics = PointStatistics.of(point, means, variances)
            if not (finite and statistics.layer_usual.isfinite()):
                raise ConfigError(
                    f"the values at {point.name or 'the model'} ({type(point.module).__name__}) are not finite on "
                    "these stills: look at the model's weights up to there, and at preprocess"
                )
            found.setdefault(kind, {})[point.name] = statistics
    if not found:
        raise ConfigError(
            "each still is one colour, for the model: at no layer does it vary over space. There is nothing to "
            "calibrate: take stills of real scenes, and look at preprocess"
        )
    return found


def with_drifts(
    model: nn.Module,
    calibration: Calibration,
    stills: Sequence[TakenFrame],
    predict: Callable[..., Any] | None = None,
) -> Calibration:
    """The calibration with the drift of every still, as a stream will see it: in a pass that its rule corrects."""
    call = model if predict is None else predict
    corrected = correction(model, calibration.replace(drifts=()))
    drifts, passes = [], PassState(model)
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), uncompiled():
        for still in stills:
            with passes.kept(), corrected.active():
                call(still.x, *still.context)
            drift = corrected.drift()
            drifts.append(0.0 if drift is None else float(drift))
    return calibration.replace(drifts=tuple(drifts))


class TakenStills(Sequence[TakenFrame]):
    """Stills that were checked, each turned into what the model takes when it is asked for.

    Attributes:
        frames: as they came.

    Args:
        frames: as above.
        intake: turns them into what the model takes.
    """

    def __init__(self, frames: Sequence[Any], intake: FrameIntake) -> None:
        self.frames, self._intake = frames, intake

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: Any) -> Any:
        return self._intake.take(self.frames[index])

    def at(self, places: Sequence[int]) -> TakenStills:
        """The stills at these places."""
        return TakenStills([self.frames[i] for i in places], self._intake)


def take_stills(
    model: nn.Module, stills: Iterable[Any], preprocess: Preprocess | None = None, least: int = LEAST_STILLS
) -> TakenStills:
    """Stills as the model takes them.

    Args:
        model: the trained model.
        stills: frames, as `StreamAdapter.step` takes them.
        preprocess: as `StreamAdapter` takes it; for timm models the model's own by default.
        least: how many there must be.

    Raises:
        ConfigError: too few stills, or a model without parameters.
        FrameError, FrameTypeError: a still cannot be used, or has another size than the first.
        StateError: the model has a StreamAdapter.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ConfigError(f"{type(model).__name__} has no parameters: there is nothing to calibrate")
    check_unowned(model)
    if isinstance(stills, str | Path) or not isinstance(stills, Iterable):
        raise ConfigError(
            f"stills is {stills!r}; expected frames, in a list for example: `ttt-adapt calibrate` reads folders and "
            "videos"
        )
    if isinstance(stills, np.ndarray | Tensor) and stills.ndim < 4:
        raise ConfigError(f"stills is one picture of {tuple(stills.shape)}; expected several, in a list for example")
    preprocess = default_preprocess(model, like.device) if preprocess is None else preprocess
    taken = TakenStills(list(stills), FrameIntake(preprocess, like.device, like.dtype))
    if len(taken) < least:
        raise ConfigError(
            f"got {len(taken)} still{'s' * (len(taken) != 1)}; expected at least {least}, better some 40, of the "
            "scenes that the model will see and in ordinary weather"
        )
    before: Tensor | None = None
    repeated = 0
    for index in range(len(taken)):
        try:
            x = taken[index].x
        except (FrameError, FrameTypeError) as error:
            raise type(error)(f"still {index}: {error}") from error
        if before is not None and x.shape != before.shape:
            raise FrameError(
                f"still {index} is {tuple(x.shape[2:])} (H, W) after preprocessing, and the first one is "
                f"{tuple(before.shape[2:])}: pass stills of the size of the stream"
            )
        repeated += before is not None and bool((x - before).abs().mean() < ALIKE * before.std())
        before = x
    if least > 1 and 2 * repeated > len(taken):
        warn(
            f"{repeated} of {len(taken)} stills hardly differ from the one before, as neighbouring frames of a camera "
            "at rest: whatever differs from them will count as a drift. Take stills of many scenes and hours"
        )
    return taken


@contextmanager
def measuring(points: Sequence[Point]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inside the block, every call of a point leaves its moments, [C] each, in the dict, by name."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(point: Point, x: Tensor) -> None:
        if x.numel() > x.shape[0] * point.channels:  # one value per channel has no deviation
            found.setdefault(point.name, []).append(point.moments(x.detach()))

    def before(point: Point) -> Any:
        return lambda _module, args, kwargs: see(point, args[0] if args else kwargs["input"])

    def after(point: Point) -> Any:
        return lambda _module, _args, output: see(point, first_tensor(output))  # type: ignore[arg-type]

    with hooks(
        point.module.register_forward_hook(in_this_thread(after(point)))
        if point.side == "output"
        else point.module.register_forward_pre_hook(in_this_thread(before(point)), with_kwargs=True)
        for point in points
    ):
        yield found
