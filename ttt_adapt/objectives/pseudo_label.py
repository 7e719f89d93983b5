"""Self-training: fit predictions of the model, of an earlier self, or of an average of its selves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.base import OutputObjective
from ttt_adapt.objectives.masking import random_mask, upsample_mask


class PseudoLabel(OutputObjective):
    """Cross-entropy on confident pseudo-labels, from an input with most of its patches hidden.

    "Test-Time Training on Video Streams", appendix A.1: labels are the classes predicted with a confidence above a
    threshold (lambda there), and 80 % of the input is masked when they are fitted. A patch is hidden by 0, the mean
    colour of a normalised image; no mask channel or branch is needed.

    Args:
        model: a model that predicts classes.
        threshold: smallest confidence, the largest probability of the softmax; 0 takes every pixel. The paper searched
            for it and does not say what it found; 0.95 is FixMatch's (Sohn et al., 2020).
        mask_ratio: share of patches hidden; 0 for none.
        patch_size: side of a patch in pixels.
        average: None: labels are the current weights' own. Otherwise a teacher's: before each step its weights are
            `average` times what they were, plus `1 - average` times the current ones. 1 is the source model.
        parameters: name in the model -> what is trained; all of the model's by default.
        logits: the model's output -> class scores [B, C, ...]; the output itself by default.

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
            self._teacher = {name: p.detach().clone() for name, p in trained}

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean cross-entropy over the pixels whose label is confident, 0 where none is; images [B, 3, H, W]."""
        if self._ratio:
            with torch.no_grad():
                target = self.scores(self.teach(images))
            scores = self.scores(self.model(self._masked(images, generator)))
        else:
            scores = self.scores(self.model(images))
            with torch.no_grad():
                target = self.scores(self.teach(images)) if self._average is not None else scores.detach()
        confidence, labels = target.softmax(1).max(1)
        chosen = confidence > self._threshold
        each = F.cross_entropy(scores, labels, reduction="none")
        return (each * chosen).sum() / chosen.sum().clamp_min(1)

    def teach(self, images: Tensor) -> Any:
        """The output of the model that labels come from: the teacher, or the model as it is without one."""
        if self._average is None:
            return self.model(images)
        return functional_call(self.model, self._teacher, (images,))

    def memory(self) -> Mapping[str, Tensor]:
        """The teacher's weights."""
        return self._teacher

    def after_step(self) -> None:
        """Move the teacher toward the current weights, in place: no copy of the model is made."""
        if self._teacher:
            assert self._average is not None
            current = [p.detach() for p in self._parameters.values()]
            torch._foreach_lerp_(list(self._teacher.values()), current, 1.0 - self._average)

    def _masked(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        h, w = images.shape[-2:]
        grid = (-(-h // self._patch), -(-w // self._patch))
        mask = random_mask(len(images), grid, self._ratio, generator=generator, device=images.device)
        return images * upsample_mask(mask, self._patch)[..., :h, :w]
