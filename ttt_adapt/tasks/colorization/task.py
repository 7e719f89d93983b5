"""Colorization as a task: the model is shown grey and gives colours, which are scored against the frame's own.

The model is shown the grey of a frame's luminance in three equal channels. It returns a and b of CIE Lab (mode
"regression"), or scores of the cells of the ab plane (mode "classification"). The predicted picture has these colours
and the luminance of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.colour import colour_frame, gamma, rgb_to_lab, to_grey
from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip
from ttt_adapt.data.drift import Drift, DriftedClip, Schedule
from ttt_adapt.data.unlabelled import open_frames
from ttt_adapt.errors import ConfigError, DataError, FrameError, nearest
from ttt_adapt.tasks.base import Criterion, Metric, Stills, Task
from ttt_adapt.tasks.colorization import cells
from ttt_adapt.tasks.colorization.clips import GreyedClip, check_scorable, common_size, without_grey
from ttt_adapt.tasks.colorization.networks import SOURCES
from ttt_adapt.tasks.colorization.score import ColourScore
from ttt_adapt.tasks.spec import ModelSpec

MODES = ("regression", "classification")
AB_SCALE = 20.0
"""In mode "regression", a and b are the output times this number, about their standard deviation in photographs."""
_COUNTED = 500  # pictures whose colours are counted
_STRIDE = 4  # the loss of cells looks at every 4th pixel: heads predict at a quarter of the resolution


class Colorization(Task):
    """A `Task`: [B, 2, H, W] or scores of cells [B, Q, H, W], a prediction uint8 RGB [H, W, 3], PSNR.

    Args:
        mode: "regression" (a and b, divided by `AB_SCALE`) or "classification" (scores of the cells of the ab plane).
        temperature: how scores of cells become a colour, see `cells.annealed_mean`.
        uniform: from 0 (the loss weighs rare colours most) to 1 (it weighs all the same), see `cells.rebalancing`.

    Raises:
        ConfigError: the mode is unknown, or a number is out of range.
    """

    name = "colorization"
    metrics = (
        Metric("psnr", "PSNR", "dB", "dB", floor="psnr_grey"),
        Metric("psnr_frames", "frame PSNR", "dB", "dB"),
        Metric("psnr_grey", "PSNR of the grey", "dB", "dB", change=""),
        Metric("ssim", "SSIM", digits=4),
        Metric("flicker", "flicker", "ab", "ab", higher_is_better=False),
        Metric("lpips", "LPIPS", digits=4, higher_is_better=False),
        Metric("fid", "FID", higher_is_better=False),
        Metric("inception_score", "Inception Score"),
    )
    about = (
        "PSNR of RGB over the whole clip; frame PSNR is the mean over frames; PSNR of the grey is that of what the "
        "arms are shown; flicker is how much the colours change otherwise than the truth's from frame to frame (dtSSD "
        "of a and b, lower is better)"
    )
    augment = Augment(saturation=(1.0, 1.0), hue=(0.0, 0.0))  # a picture is there to teach its colours
    keeps_classes = labelled = False
    source = "grey"
    weight_files = tuple(SOURCES)

    def __init__(self, mode: str = "regression", temperature: float = 0.38, uniform: float = 0.5) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if not _is_number(temperature) or not 0 < temperature <= 1:
            raise ConfigError(f"temperature is {temperature!r}; expected a number above 0 and up to 1")
        if not _is_number(uniform) or not 0 <= uniform <= 1:
            raise ConfigError(f"uniform is {uniform!r}; expected a number from 0 to 1")
        self.mode, self._temperature, self._uniform = mode, temperature, uniform
        self.distribution = mode == "classification"
        self.outputs = "scores of colour cells" if self.distribution else "a and b"

    @classmethod
    def of(cls, spec: ModelSpec) -> Colorization:
        """The task with the description's options."""
        known = ("mode", "temperature", "uniform")
        for name in spec.task_options:
            if name not in known:
                raise ConfigError(f"colorization has no option {name!r}; {nearest(name, known)}")
        return cls(**spec.task_options)

    @property
    def channels(self) -> int:
        """2 for a and b, or one per cell."""
        return len(cells.cells()) if self.distribution else 2

    @classmethod
    def stills(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None
    ) -> Stills:
        """Every picture under `data` that is stored in colour, and all frames of the videos that show colour."""
        _refuse_classes(classes)
        found = open_frames(data, list(names) or None, size)
        kept, notes = without_grey(found)
        return Stills(kept, size or common_size(kept), notes=tuple(f"{data}: {note}" for note in notes))

    @classmethod
    def clips(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None, format: str
    ) -> list[Clip]:
        """Clips of (grey frame, its colours). The model is never shown the colours."""
        _refuse_classes(classes)
        if format != "auto":
            raise ConfigError(
                f"format {format!r} is of labels, and colorization has none: leave it out, every folder will do"
            )
        return [cls.adopt(clip) for clip in open_frames(data, list(names) or None, size)]

    @classmethod
    def adopt(cls, clip: Clip) -> Clip:
        """The clip's frames in grey, with their colours as labels."""
        return GreyedClip(clip)

    @classmethod
    def drifted(cls, clip: Clip, drift: Drift | Schedule) -> Clip:
        """The drift happens to the frames in colour: the model is shown its grey, and is to find its colours."""
        return cls.adopt(DriftedClip(clip.in_colour if isinstance(clip, GreyedClip) else clip, drift))

    @classmethod
    def check_clip(cls, clip: Clip) -> None:
        """Refuse a clip that is too small, or whose frames show no colour. Looks at a few frames.

        Raises:
            DataError: the clip is too small, or shows no colour.
        """
        check_scorable(clip)

    def sample(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The grey of the picture's luminance, and its a and b, [2, H, W]."""
        lab = rgb_to_lab(image)
        light = torch.where(lab[:1] > 8, ((lab[:1].clamp_min(8) + 16) / 116) ** 3, lab[:1] * (27 / 24389))
        return gamma(light).clamp(0, 1).expand(3, -1, -1).contiguous(), lab[1:].contiguous()

    def criterion(self, samples: Any) -> Criterion:
        """Huber loss on a and b; or cross-entropy over cells, where rare cells weigh more."""
        if not self.distribution:
            return lambda output, ab: F.smooth_l1_loss(output, ab / AB_SCALE)
        weights = cells.rebalancing(_count_cells(samples), self._uniform)

        def loss(output: Tensor, ab: Tensor) -> Tensor:
            first = slice(_STRIDE // 2, None, _STRIDE)
            return cells.soft_cross_entropy(output[..., first, first], ab[..., first, first], weights)

        return loss

    def see(self, frame: np.ndarray) -> np.ndarray:
        """The grey of the frame's luminance."""
        return to_grey(frame)

    def predict(self, output: Tensor, frame: np.ndarray) -> np.ndarray:
        """The frame in colour: a and b come from the output, resized to the frame; the luminance is the frame's.

        Raises:
            FrameError: the output holds numbers that are not finite.
        """
        if not output.isfinite().all():
            raise FrameError(
                f"the model returned {self.outputs} that are not finite (NaN or infinity): it has diverged; lower the "
                "learning rate of adaptation (lr), or train the checkpoint anew"
            )
        ab = cells.annealed_mean(output, self._temperature) if self.distribution else output * AB_SCALE
        ab = ab.detach().float()
        if ab.shape[2:] != frame.shape[:2]:
            ab = F.interpolate(ab, frame.shape[:2], mode="bilinear", align_corners=False)
        return colour_frame(frame, ab[0].cpu())

    def draw(self, frame: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The prediction itself: it is a picture."""
        return prediction

    def score(self, ignore: int = 255, weights: Path | None = None) -> ColourScore:
        """An empty score of the difference to the true colours."""
        return ColourScore(weights)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_classes(classes: Sequence[str] | None) -> None:
    if classes:
        raise ConfigError(f"classes are {', '.join(classes)}; colorization has no classes: leave them out")


def _count_cells(samples: Any) -> Tensor:
    """How many pixels are in each cell, float64 [Q], over up to `_COUNTED` augmented training samples."""
    step = max(len(samples) // _COUNTED, 1)
    counts = torch.zeros(len(cells.cells()), dtype=torch.float64)
    for index in range(0, len(samples), step):
        ab = samples[index][1][:, ::_STRIDE, ::_STRIDE]
        counts += torch.bincount(cells.nearest(ab.movedim(0, -1)).flatten(), minlength=len(counts))
    if not counts.any():
        raise DataError("no picture has a pixel to count the colours of")
    return counts
