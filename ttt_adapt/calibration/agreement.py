"""How good predictions are: by labels, or without them by how little a drift moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.features import tensors


def class_scores(output: Any) -> Tensor | None:
    """Class scores [B, C, ...] of a model's output: its first tensor, if that looks like some; else None."""
    found = next(tensors(output), None)
    return found if found is not None and found.ndim >= 2 and found.shape[1] > 1 else None


def agreement_with(clean: Sequence[Any], labels: Sequence[Any] | None, ignore: int) -> Callable[[Sequence[Any]], float]:
    """What scores outputs, larger is better: by labels where there are some, else by agreement with the clean outputs.

    Args:
        clean: the plain model's outputs on the clean stills.
        labels: class ids of every still, or None.
        ignore: id of pixels that do not count.
    """
    return ByAgreement(clean) if labels is None else ByLabels(labels, ignore)


class ByLabels:
    """Mean IoU of the predicted classes over all stills; of one class per image, accuracy.

    Args:
        labels: class ids [H, W] (or a single id) of every still.
        ignore: id of pixels that do not count.
    """

    def __init__(self, labels: Sequence[Any], ignore: int = 255) -> None:
        self._labels, self._ignore = [torch.as_tensor(np.asarray(label)).long() for label in labels], ignore

    def __call__(self, outputs: Sequence[Any]) -> float:
        """The score of outputs for the stills, in [0, 1]; larger is better.

        Raises:
            ConfigError: an output is no class scores, or of another size than its label.
        """
        hits, inside, seen = (torch.zeros(256, dtype=torch.float64) for _ in range(3))
        for output, label in zip(outputs, self._labels, strict=True):
            scores = class_scores(output)
            got = None if scores is None else scores[0].argmax(0).cpu()
            if got is None or got.shape != label.shape:
                raise ConfigError(
                    f"labels have the shape {tuple(label.shape)}, and the model's output "
                    f"{'is no class scores' if scores is None else f'has the shape {tuple(scores.shape)}'}: expected "
                    "class scores [1, C, H, W] for labels [H, W]; leave the labels out for other models"
                )
            counts = label != self._ignore
            got, label = got[counts], label[counts]
            hits += torch.bincount(label[got == label], minlength=256)[:256]
            inside += torch.bincount(got, minlength=256)[:256]
            seen += torch.bincount(label, minlength=256)[:256]
        if self._labels[0].ndim == 0:
            return float(hits.sum() / seen.sum().clamp_min(1))
        there = seen > 0
        return float((hits[there] / (inside + seen - hits)[there]).mean())


class ByAgreement:
    """How far predictions agree with those of the plain model on the clean stills.

    Of class scores, the overlap of the two distributions, averaged over pixels: 1 minus their total variation. Of any
    other output, 1 / (1 + mean absolute difference / mean absolute deviation of the clean outputs).

    Args:
        clean: the plain model's outputs on the clean stills.
    """

    def __init__(self, clean: Sequence[Any]) -> None:
        self._clean = [self._prepared(output) for output in clean]

    def __call__(self, outputs: Sequence[Any]) -> float:
        """The mean agreement over the stills, in [0, 1]."""
        found = [self._agree(c, self._prepared(o)) for c, o in zip(self._clean, outputs, strict=True)]
        return float(torch.stack(found).mean())

    @staticmethod
    def _prepared(output: Any) -> tuple[bool, list[Tensor]]:
        scores = class_scores(output)
        if scores is not None and scores.is_floating_point():
            return True, [scores.float().softmax(1)]
        return False, [t.float() for t in tensors(output)]

    @staticmethod
    def _agree(clean: tuple[bool, list[Tensor]], other: tuple[bool, list[Tensor]]) -> Tensor:
        if clean[0]:
            return torch.minimum(clean[1][0], other[1][0]).sum(1).mean()
        pairs = [(a, b) for a, b in zip(clean[1], other[1], strict=False) if a.shape == b.shape and a.numel()]
        if not pairs:
            raise ConfigError(
                "the model's output holds no tensors of one size for one frame and its drifted version: pass labels, "
                "or choose=False to take the default rule"
            )
        ratios = [(a - b).abs().mean() / (a - a.mean()).abs().mean().clamp_min(1e-12) for a, b in pairs]
        return 1.0 / (1.0 + torch.stack(ratios).mean())
