"""Freeze, update, replace or blend the running statistics of BatchNorm and similar layers, for one `with` block.

| inside the block of | a pass is normalised by | and running statistics |
|---|---|---|
| `frozen_norms` | the running statistics | stay |
| `updating_norms` | the statistics of its own batch | move toward these |
| `batch_statistics` | the statistics of its own batch | stay |
| `blended_statistics` | a weighted mean of both | stay |

An input with one value per channel has no variance. It is normalised by the running statistics and never changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ttt_adapt.errors import StateError
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.threads import ANOTHER_THREAD, in_this_thread


def norm_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of `module` that keep running statistics: BatchNorm, and InstanceNorm where it tracks them."""
    return [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises: BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm and their subclasses."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, kinds) or "RMSNorm" in type(module).__name__ or "RmsNorm" in type(module).__name__


@contextmanager
def frozen_norms(norms: list[nn.Module]) -> Iterator[None]:
    """Inside the block, the layers use their running statistics and do not change them.

    Layers in training mode use a copy of them. A backward pass needs the values of the forward pass, and a pass of the
    main task between the two may change the original.
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
def updating_norms(norms: list[nn.Module], momentum: float) -> Iterator[list[Tensor]]:
    """Inside the block, passes move the running statistics toward their own by the share `momentum`, in [0, 1].

    A layer that sees one value per channel, for example after global pooling, uses its running statistics. If any of
    the statistics is not finite after the block, none has moved; the host does not wait to know.

    Yields:
        A list. After the block it holds bool scalars on the devices of the statistics, all of them true if these moved.
    """
    moved: list[Tensor] = []
    moving = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    before = [t.clone() for t in moving]  # type: ignore[operator]
    with _training(norms, momentum=momentum):
        yield moved
    moved += _undo_if_not_finite(moving, before)  # type: ignore[arg-type]


@torch.no_grad()
def _undo_if_not_finite(tensors: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """Give tensors their values of before, all of them, if any of them holds NaN or infinite values.

    Returns:
        For each kind of tensors, whether they hold none: bool scalars on their devices.
    """
    kinds, sound = dict.fromkeys((t.device, t.dtype) for t in tensors), []
    for kind in kinds:
        own = [t for t in tensors if (t.device, t.dtype) == kind]
        old = [b for t, b in zip(tensors, before, strict=True) if (t.device, t.dtype) == kind]
        flat = torch.cat([t.flatten() for t in own])
        sound.append(flat.isfinite().all())
        kept = torch.where(sound[-1], flat, torch.cat([t.flatten() for t in old]))
        values = [v.view_as(t) for v, t in zip(kept.split([t.numel() for t in own]), own, strict=True)]
        torch._foreach_copy_(own, values)
    return sound


@contextmanager
def batch_statistics(norms: list[nn.Module]) -> Iterator[None]:
    """Inside the block, passes are normalised by the statistics of their own batch; the running ones do not change.

    A layer that sees one value per channel, for example after global pooling, uses its running statistics.
    """
    # without buffers: InstanceNorm changes those that it has, whatever the flag says
    with _training(norms, track_running_stats=False, running_mean=None, running_var=None):
        yield


@contextmanager
def blended_statistics(norms: Iterable[nn.Module], share: float) -> Iterator[None]:
    """Inside the block, passes are normalised by `(1 - share) * running + share * own`, for mean and variance.

    "own" are the statistics of the pass' own batch, with the unbiased variance, as running statistics have it. Source:
    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020,
    where `share` is n / (n + N). The running statistics do not change, also in layers in training mode. A layer that
    sees one value per channel uses its running statistics.
    """
    before: dict[nn.Module, dict[str, Any]] = {}

    def begins(norm: nn.Module, x: Tensor) -> None:
        before[norm] = {name: getattr(norm, name) for name in ("training", "running_mean", "running_var")}
        _set(norm, {"training": False})
        if _values_per_channel(norm, x) > 1:
            axis = _channel_axis(norm, x)
            count = x.numel() // x.shape[axis]
            mean, variance = channel_moments(x.detach(), axis)
            for name, own in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
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


def channel_moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of `x`, over all axes but `axis`: float32 or wider, [C] each.

    The variance is the mean of squares minus the square of the mean; with channels last, of values less the first one.
    Rounding changes it by some 1e-5 * (mean^2 + variance), so a channel whose mean is hundreds of deviations from 0 has
    no meaningful variance. The two passes over `x` take a thirtieth of the time of `torch.var_mean` on a CPU.
    """
    if torch.is_autocast_enabled(x.device.type):  # which would multiply matrices in half precision
        with torch.autocast(x.device.type, enabled=False):
            return channel_moments(x, axis)
    kind = torch.promote_types(x.dtype, torch.float32)
    if axis in (-1, x.ndim - 1):
        rows = x.flatten(0, -2).to(kind)  # [values, C]
        first = rows[0].clone()
        rows = rows - first  # squares of numbers far from 0 would lose their difference
        share = rows.new_full((1, len(rows)), 1.0 / len(rows))
        mean, square = (share @ rows)[0], (share @ rows.square())[0]
        return mean + first, torch.addcmul(square, mean, mean, value=-1.0).relu_()
    x = x.flatten(axis + 1)  # fewer axes are quicker
    axes = [each for each in range(x.ndim) if each != axis]
    mean = x.mean(axes, dtype=kind)
    norm = torch.linalg.vector_norm(x, dim=axes, dtype=kind)
    # a number from Python would be made a tensor first, which takes as long as the multiplication
    variance = torch.addcmul(mean * mean, norm, norm, value=-x.shape[axis] / x.numel()).neg_()
    return mean, variance.relu_()


def frame_statistics(kind: str, norms: list[nn.Module], share: float) -> AbstractContextManager[None]:
    """Inside the block, the model predicts a frame with the statistics that `StreamConfig.norm_stats` names.

    Args:
        kind: "frozen", "ema", "blend" or "batch".
        norms: the model's `norm_layers`.
        share: weight of the frame's own statistics in "blend", in [0, 1].
    """
    if kind == "blend":
        return blended_statistics(norms, share)
    return batch_statistics(norms) if kind == "batch" else nullcontext()


@contextmanager
def _training(norms: list[nn.Module], **settings: Any) -> Iterator[None]:
    """Inside the block, these layers are in training mode and have these settings as attributes.

    An input with one value per channel is the exception: for it, a layer is as it was, in evaluation mode. The number
    of values depends on the images, so it is looked at in each call of a layer.
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
    norms: Iterable[nn.Module], begins: Callable[[nn.Module, Tensor], None], ends: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Inside the block, each call `layer(x)` of these layers comes between `begins(layer, x)` and `ends(layer)`.

    Raises:
        StateError: at the end of the block, where the layers were called in another thread alone.
    """
    here, elsewhere = list[None](), list[None]()

    def call_begins(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            here.append(None)
        begins(norm, args[0] if args else kwargs["input"])

    def call_ends(norm: nn.Module, _args: Any, _output: Any) -> None:
        ends(norm)

    with hooks(
        handle
        for norm in norms
        for handle in (
            norm.register_forward_pre_hook(
                in_this_thread(call_begins, lambda: elsewhere.append(None)), with_kwargs=True
            ),
            norm.register_forward_hook(in_this_thread(call_ends)),
        )
    ):
        yield
    if elsewhere and not here:
        raise StateError(ANOTHER_THREAD)


def _set(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Set attributes, by name."""
    for name, value in settings.items():
        setattr(module, name, value)


def _values_per_channel(norm: nn.Module, x: Tensor) -> int:
    """How many values of `x` the layer takes the statistics of a channel over."""
    inside = math.prod(x.shape[_channel_axis(norm, x) + 1 :])  # of one image
    return inside if isinstance(norm, _InstanceNorm) else x.shape[0] * inside


def _channel_axis(norm: nn.Module, x: Tensor) -> int:
    """Which axis of `x` is C: 1 of [B, C, ...], and 0 of one image [C, ...], which InstanceNorm takes too."""
    return 0 if isinstance(norm, _InstanceNorm) and x.ndim == norm._get_no_batch_dim() else 1
