"""Self-training: the labels are predictions of the model itself, or of an average of its earlier weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.half import HALF
from ttt_adapt.model.other_weights import with_other_weights
from ttt_adapt.objectives.base import OutputObjective
from ttt_adapt.objectives.masking import grid_to_mask, random_mask, visible_pixels


class PseudoLabel(OutputObjective):
    """Cross-entropy on confident pseudo-labels, from an input with most of its patches hidden.

    Source: "Test-Time Training on Video Streams", appendix A.1. The labels are the classes that are predicted with a
    confidence above a threshold (lambda there). The model then has to predict them from an image of which 80 % is
    hidden. Hidden patches are filled with 0, the mean colour of a normalised image; no branch is needed.

    Args:
        model: a model that predicts classes.
        threshold: labels of a lower confidence are not used, in [0, 1]; the confidence is the largest probability of
            the softmax. 0 uses every pixel. The paper searched for it and does not say what it found; 0.95 is the
            value of FixMatch (Sohn et al., 2020).
        mask_ratio: share of patches to hide, in [0, 1); 0 hides none.
        patch_size: side of a patch in pixels.
        average: None: the model's current weights predict the labels. A number in [0, 1]: a teacher predicts them. Its
            weights start as those of the model, and after each step they become `average` times their value plus
            `1 - average` times the model's. With 1 the teacher stays the source model.
        parameters: name in the model -> parameter to train; all of the model by default.
        logits: makes class scores [B, C, ...] of the model's output; by default the output is taken as it is.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 0.95,
        mask_ratio: float = 0.8,
        patch_size: int = 16,
        *,
        average: float | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        limits = {"threshold": threshold, "mask_ratio": mask_ratio, "average": 0.0 if average is None else average}
        for name, value in limits.items():
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0 or (name, value) == ("mask_ratio", 1):
                raise ConfigError(f"{name} is {value!r}; expected a number between 0 and 1")
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ConfigError(f"patch_size is {patch_size!r}; expected a whole number of pixels, at least 1")
        super().__init__(model, dict(model.named_parameters()) if parameters is None else parameters, logits)
        self._threshold, self._ratio, self._patch, self._average = threshold, mask_ratio, patch_size, average
        with torch.inference_mode(False):
            trained = self._parameters.items() if average is not None else ()
            self._teacher = {name: p.detach().to(_kept_in(p), copy=True) for name, p in trained}

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy over the pixels of images [B, 3, H, W] with a confident label; 0 if there are none."""
        if self._ratio:
            with torch.no_grad():
                target = self.scores(self.teach(images))
            scores = self.scores(self.model(self._masked(images, generator)))
        else:
            scores = self.scores(self.model(images))
            with torch.no_grad():
                target = self.scores(self.teach(images)) if self._average is not None else scores.detach()
        confidence, labels = target.softmax(1).max(1)  # [B, ...] each
        chosen = confidence > self._threshold  # bool [B, ...]
        each = F.cross_entropy(scores, labels, reduction="none")  # [B, ...]
        return (each * chosen).sum() / chosen.sum().clamp_min(1)

    def teach(self, images: Tensor) -> Any:
        """What the teacher predicts for images [B, 3, H, W]; without a teacher, what the model predicts."""
        if self._average is None:
            return self.model(images)
        teacher = {name: self._in_pass(name, weight, images.dtype) for name, weight in self._teacher.items()}
        with with_other_weights(self.model, teacher):
            return self.model(images)

    def _in_pass(self, name: str, weight: Tensor, images: torch.dtype) -> Tensor:
        """A weight of the teacher as a pass over such images takes it: in their half precision, if the model's is."""
        own = self._parameters[name].dtype
        return weight.to((images if images in HALF else own) if own in HALF else weight.dtype)

    def memory(self) -> Mapping[str, Tensor]:
        """The teacher's weights by name, float32 for those in half precision; empty without a teacher."""
        return self._teacher

    def after_step(self) -> None:
        """Move the teacher's weights toward the model's, in place."""
        if self._teacher:
            assert self._average is not None
            current = [p.detach().to(_kept_in(p)) for p in self._parameters.values()]
            torch._foreach_lerp_(list(self._teacher.values()), current, 1.0 - self._average)

    def _masked(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images [B, 3, H, W] with 0 in randomly hidden patches."""
        size = images.shape[-2:]
        grid = grid_to_mask(size, self._patch)
        mask = random_mask(len(images), grid, self._ratio, generator=generator, device=images.device)
        return images * visible_pixels(mask, self._patch, size)


def _kept_in(parameter: Tensor) -> torch.dtype:
    """The precision in which the teacher keeps a weight: small steps of an average are lost in half precision."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype
