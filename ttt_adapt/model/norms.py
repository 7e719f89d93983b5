"""BatchNorm and its kin on a stream: which statistics a pass is normalised by, and which of them it changes.

`frozen_norms` keeps a pass out of the running statistics, `updating_norms` lets it into them, with `batch_statistics`
it has its own, and with `blended_statistics` something in between. One value per channel has no statistics: those
inputs meet the running ones. Nothing stays on the model outside of a `with` block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ttt_adapt.model.hooks import hooks


def norm_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of `module` that keep running statistics (BatchNorm and its kin)."""
    return [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]


@contextmanager
def frozen_norms(norms: list[nn.Module]) -> Iterator[None]:
    """Inside the block, the layers use their running statistics and do not change them.

    Layers in training mode use copies: a main-task pass before the backward pass would change the originals under it.
    """
    training = [(norm, norm.running_mean, norm.running_var) for norm in norms if norm.training]
    for norm, mean, var in training:
        norm.training = False
        norm.running_mean, norm.running_var = mean.clone(), var.clone()  # type: ignore[operator]
    try:
        yield
    finally:
        for norm, mean, var in training:
            norm.training, norm.running_mean, norm.running_var = True, mean, var


@contextmanager
def updating_norms(norms: list[nn.Module], momentum: float) -> Iterator[None]:
    """Inside the block, passes blend their statistics into the running ones with weight `momentum`.

    A layer that sees one value per channel, as behind global pooling, uses its running statistics and leaves them.
    """
    with _training(norms, momentum=momentum):
        yield


@contextmanager
def batch_statistics(norms: list[nn.Module]) -> Iterator[None]:
    """Inside the block, passes are normalised by the statistics of their own batch; the running ones do not change.

    A layer that sees one value per channel, as behind global pooling, uses its running statistics.
    """
    own = {
        "track_running_stats": False,
        "running_mean": None,
        "running_var": None,
    }  # InstanceNorm writes into any it has
    with _training(norms, **own):
        yield


@contextmanager
def blended_statistics(norms: list[nn.Module], share: float) -> Iterator[None]:
    """Inside the block, passes are normalised by a blend of running statistics and those of their own batch.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020:
    `(1 - share) * running + share * own` for mean and variance, in every layer; their `share` is n / (n + N). The own
    variance is the unbiased one, as in running statistics, which do not change, also those of layers in training
    mode. A layer that sees one value per channel uses its running statistics.
    """
    before: dict[nn.Module, dict[str, Any]] = {}

    def begins(norm: nn.Module, x: Tensor) -> None:
        before[norm] = {name: getattr(norm, name) for name in ("training", "running_mean", "running_var")}
        _set(norm, {"training": False})
        if _values_per_channel(norm, x) > 1:
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # squares of half precision overflow
            variance, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != _channel_axis(norm, x)])
            for name, own in (("running_mean", mean), ("running_var", variance)):
                running = before[norm][name]
                setattr(norm, name, running.lerp(own.to(running), share))

    def ends(norm: nn.Module) -> None:
        _set(norm, before.pop(norm))

    with _around_calls(norms, begins, ends):
        try:
            yield
        finally:
            for norm, own in before.items():
                _set(norm, own)


def frame_statistics(kind: str, norms: list[nn.Module], share: float) -> AbstractContextManager[None]:
    """Inside the block, a frame is predicted as `StreamConfig.norm_stats` says.

    Args:
        kind: "frozen", "ema", "blend" or "batch".
        norms: the model's `norm_layers`.
        share: of the frame in "blend".
    """
    if kind == "blend":
        return blended_statistics(norms, share)
    return batch_statistics(norms) if kind == "batch" else nullcontext()


@contextmanager
def _training(norms: list[nn.Module], **settings: Any) -> Iterator[None]:
    """Inside the block, layers with running statistics train, with these settings, wherever there is more than a value.

    Whether there is depends on the images, so it is decided at each call of a layer.
    """
    inside = {"training": True, "track_running_stats": True, **settings}
    before = {norm: {name: getattr(norm, name) for name in inside} for norm in norms}

    def begins(norm: nn.Module, x: Tensor) -> None:
        if _values_per_channel(norm, x) == 1:
            _set(norm, {**before[norm], "training": False})

    with _around_calls(norms, begins, lambda norm: _set(norm, inside)):
        try:
            for norm in norms:
                _set(norm, inside)
            yield
        finally:
            for norm, own in before.items():
                _set(norm, own)


@contextmanager
def _around_calls(
    norms: list[nn.Module], begins: Callable[[nn.Module, Tensor], None], ends: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Inside the block, `begins(layer, x)` comes before every call of these layers with x, and `ends(layer)` after."""

    def call_begins(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begins(norm, args[0] if args else kwargs["input"])

    def call_ends(norm: nn.Module, _args: Any, _output: Any) -> None:
        ends(norm)

    with hooks(
        handle
        for norm in norms
        for handle in (
            norm.register_forward_pre_hook(call_begins, with_kwargs=True),
            norm.register_forward_hook(call_ends),
        )
    ):
        yield


def _set(module: nn.Module, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        setattr(module, name, value)


def _values_per_channel(norm: nn.Module, x: Tensor) -> int:
    """How many values the layer's statistics of `x` are taken over."""
    inside = math.prod(x.shape[_channel_axis(norm, x) + 1 :])
    return inside if isinstance(norm, _InstanceNorm) else x.shape[0] * inside  # each image on its own, or all together


def _channel_axis(norm: nn.Module, x: Tensor) -> int:
    """1 of [B, C, ...]; InstanceNorm also takes one image, [C, ...]."""
    return 0 if isinstance(norm, _InstanceNorm) and x.ndim == norm._get_no_batch_dim() else 1
