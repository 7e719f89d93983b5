"""How good predictions are: by labels, or without them by how little a drift moves them.

Outputs are scored as they come. Of the plain model's clean outputs, what is kept is thinned out to `SIDE` values along
each side of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.features import tensors

SIDE = 256
LEAST_CLASSES = 4
"""An output with fewer channels may as well be a depth, a flow, a colour or a normal."""

Score = Callable[[Iterable[Any]], float]
"""Outputs for the stills, one after the other -> a number; larger is better."""


def score_by(
    clean: Iterable[Any], labels: Sequence[Any] | None, ignore: int | None, distribution: bool | None = None
) -> Score:
    """What scores outputs: by labels where there are some, else by agreement with the clean outputs.

    Args:
        clean: the plain model's outputs on the clean stills.
        labels: class ids of every still, or None.
        ignore: id of pixels that do not count.
        distribution: whether outputs are class scores; None: they are where they have at least 4 channels.
    """
    return ByAgreement(clean, distribution) if labels is None else ByLabels(labels, ignore)


def compared(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """Mean relative gain of the scores under drifts, and relative loss of the one without, which is named "none"."""
    relative = {name: after[name] / max(before[name], 1e-9) - 1.0 for name in after}
    return float(np.mean([value for name, value in relative.items() if name != "none"])), -relative["none"]


def class_ids(label: Any) -> Tensor:
    """A label as int64 class ids on the CPU; it may be an array, a tensor on any device, or a single id."""
    plain = label.detach().cpu() if isinstance(label, Tensor) else torch.from_numpy(np.array(label))
    return plain.long()


class ByLabels:
    """Mean IoU of the predicted classes over all stills; of one class per image, accuracy.

    Args:
        labels: class ids [H, W] (or a single id) of every still.
        ignore: id of pixels that do not count; None: all count. Single ids all count.
    """

    def __init__(self, labels: Sequence[Any], ignore: int | None = 255) -> None:
        self._labels = [class_ids(label) for label in labels]
        self._ignore = ignore

    def __call__(self, outputs: Iterable[Any]) -> float:
        """The score of outputs for the stills, in [0, 1]; larger is better.

        Raises:
            ConfigError: an output is no class scores, or does not fit its label.
        """
        hits = inside = seen = torch.zeros((), dtype=torch.float64, device="cpu")
        for output, label in zip(outputs, self._labels, strict=True):
            got, classes = self._predicted(output, label)
            all_count = label.ndim == 0 or self._ignore is None
            counts = torch.ones_like(label, dtype=torch.bool) if all_count else label != self._ignore
            got, known = got[counts], label[counts]
            if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
                raise ConfigError(
                    f"a label has class ids from {int(known.min())} to {int(known.max())}, and the model has {classes} "
                    f"classes, from 0 on; id {self._ignore} is ignored: pass ignore=, or labels of these classes"
                )
            hits = hits + torch.bincount(known[got == known], minlength=classes)
            inside = inside + torch.bincount(got, minlength=classes)
            seen = seen + torch.bincount(known, minlength=classes)
        if self._labels[0].ndim == 0:
            return float(hits.sum() / seen.sum())
        there = seen > 0
        return float((hits[there] / (inside + seen - hits)[there]).mean()) if bool(there.any()) else 0.0

    @staticmethod
    def _predicted(output: Any, label: Tensor) -> tuple[Tensor, int]:
        """The predicted class ids, and how many classes there are."""
        scores = next(tensors(output), None)
        if scores is None or scores.ndim < 2 or scores.shape[1] < 2 or scores[0, 0].shape != label.shape:
            got = "no tensor" if scores is None else f"a tensor of {tuple(scores.shape)}"
            raise ConfigError(
                f"the labels have the shape {tuple(label.shape)}, and the model returned {got}; expected class scores "
                "[1, C, H, W] for labels [H, W]: pass predict=, which makes them of the model's output, or leave the "
                "labels out"
            )
        return scores[0].argmax(0).cpu(), scores.shape[1]


class ByAgreement:
    """How far predictions agree with those of the plain model on the clean stills.

    Of class scores, the overlap of the two distributions, averaged over pixels: 1 minus their total variation. Of any
    other output, 1 / (1 + mean absolute difference / mean absolute deviation of the clean outputs).

    Args:
        clean: the plain model's outputs on the clean stills.
        distribution: whether outputs are class scores; None: they are where they have at least 4 channels.
    """

    def __init__(self, clean: Iterable[Any], distribution: bool | None = None) -> None:
        self._distribution = distribution
        self._clean = [self._prepared(output) for output in clean]

    def __call__(self, outputs: Iterable[Any]) -> float:
        """The mean agreement over the stills, in [0, 1]."""
        found = [self._agree(c, self._prepared(o)) for c, o in zip(self._clean, outputs, strict=True)]
        return float(torch.stack(found).mean())

    def _prepared(self, output: Any) -> tuple[bool, list[Tensor]]:
        """Whether it is a distribution; and its tensors, thinned out."""
        found = [_thinned(tensor.float()) for tensor in tensors(output)]
        channels = found[0].shape[1] if found and found[0].ndim >= 2 else 1
        if channels > 1 and (channels >= LEAST_CLASSES if self._distribution is None else self._distribution):
            return True, [found[0].softmax(1)]
        return False, found

    @staticmethod
    def _agree(clean: tuple[bool, list[Tensor]], other: tuple[bool, list[Tensor]]) -> Tensor:
        if clean[0] and clean[1][0].shape == other[1][0].shape:
            return torch.minimum(clean[1][0], other[1][0]).sum(1).mean()
        pairs = [(a, b) for a, b in zip(clean[1], other[1], strict=False) if a.shape == b.shape and a.numel()]
        if not pairs:
            raise ConfigError(
                "the model's output holds no tensors of one size for one frame and its drifted version: pass labels, "
                "or choose=False to take the default rule"
            )
        ratios = [(a - b).abs().mean() / (a - a.mean()).abs().mean().clamp_min(1e-12) for a, b in pairs]
        return 1.0 / (1.0 + torch.stack(ratios).mean())


def _thinned(x: Tensor) -> Tensor:
    """A map [B, C, H, W] with at most `SIDE` values along each side, evenly spaced; any other tensor as it is."""
    if x.ndim != 4 or max(x.shape[2:]) <= SIDE:
        return x
    step = -(-max(x.shape[2:]) // SIDE)
    return x[..., ::step, ::step].clone()
