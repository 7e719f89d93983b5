"""Measure what a model is like on source stills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError
from ttt_adapt.model.calibration import Calibration, PointStatistics, default_rule, divergence, fingerprint_of
from ttt_adapt.model.frames import FrameIntake, Preprocess, TakenFrame, default_preprocess
from ttt_adapt.model.hooks import hooks, uncompiled
from ttt_adapt.model.points import Point, first_tensor, points_of_pass
from ttt_adapt.model.probe import evaluating

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
    passes: dict[str, list[int]] = {}  # of each still
    losses = []
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), uncompiled():
        kinds = points_of_pass(model, stills[0].x, lambda: call(stills[0].x, *stills[0].context))
        points = [point for kind in kinds.values() for point in kind]
        if not points:
            raise ConfigError(
                f"{type(model).__name__} has no normalisation layer, no repeated block whose output has a grid, "
                "and no convolution of the image: there is nothing to calibrate"
            )
        for still in stills:
            with measuring(points) as found:
                call(still.x, *still.context)
            for name, each in found.items():
                moments.setdefault(name, []).extend(each)
                passes.setdefault(name, []).append(len(each))
            if loss is not None:
                losses.append(loss(still.x).float())
    pairs = {}  # name -> means and variances, [passes of all stills, C] each
    for name, seen in moments.items():
        means, variances = zip(*seen, strict=True)
        pairs[name] = torch.stack(means), torch.stack(variances)
    statistics = {
        kind: {point.name: PointStatistics.of(point, *pairs[point.name]) for point in members if point.name in pairs}
        for kind, members in kinds.items()
    }
    statistics = {kind: members for kind, members in statistics.items() if members}
    height, width = stills[0].x.shape[-2:]
    spread = torch.stack(losses) if losses else None
    return Calibration(
        statistics=statistics,
        rule=default_rule(statistics),
        fingerprint=fingerprint_of(model),
        stills=len(stills),
        size=(int(height), int(width)),
        drifts={kind: _drifts(members, pairs, passes) for kind, members in statistics.items()},
        loss=None if spread is None else (float(spread.mean()), float(spread.std())),
    )


def _drifts(
    points: Mapping[str, PointStatistics],
    moments: Mapping[str, tuple[Tensor, Tensor]],
    passes: Mapping[str, Sequence[int]],
) -> list[float]:
    """For each still the mean over points and passes of a layer's divergence, in units of its mean over the stills."""
    layers = []
    for name, each in points.items():
        d = divergence(*moments[name], each.mean, each.std).mean(1) / each.layer_usual.clamp_min(1e-12)
        layers.append(torch.stack([one.mean() for one in d.split(list(passes[name]))]))
    drifts: list[float] = torch.stack(layers).mean(0).tolist()
    return drifts


def take_stills(
    model: nn.Module, stills: Iterable[Any], preprocess: Preprocess | None = None, least: int = LEAST_STILLS
) -> list[TakenFrame]:
    """Stills as the model takes them.

    Args:
        model: the trained model.
        stills: frames, as `StreamAdapter.step` takes them.
        preprocess: as `StreamAdapter` takes it; for timm models the model's own by default.
        least: how many there must be.

    Raises:
        ConfigError: too few stills.
        FrameError, FrameTypeError: a still cannot be used, or has another size than the first.
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    preprocess = default_preprocess(model, like.device) if preprocess is None else preprocess
    intake = FrameIntake(preprocess, like.device, like.dtype)
    taken: list[TakenFrame] = []
    for index, still in enumerate(stills):
        try:
            frame = intake.take(still)
        except (FrameError, FrameTypeError) as error:
            raise type(error)(f"still {index}: {error}") from error
        if taken and frame.x.shape != taken[0].x.shape:
            raise FrameError(
                f"still {index} is {tuple(frame.x.shape[2:])} (H, W) after preprocessing, and the first one is "
                f"{tuple(taken[0].x.shape[2:])}: pass stills of the size of the stream"
            )
        taken.append(frame)
    if len(taken) < least:
        raise ConfigError(
            f"got {len(taken)} stills; expected at least {least}, better some 40, of the scenes that the model will "
            "see and in ordinary weather"
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
        point.module.register_forward_hook(after(point))
        if point.side == "output"
        else point.module.register_forward_pre_hook(before(point), with_kwargs=True)
        for point in points
    ):
        yield found
