"""Scores of colorization: PSNR, SSIM, LPIPS, FID and Inception Score by torchmetrics, and the flicker of colours.

- **PSNR** (dB, of 8-bit RGB): from the squared error of the whole clip (`psnr`), and per frame, averaged
  (`psnr_frames`). It is at most 100 dB, which an exact frame gets. `psnr_grey` is the PSNR of the grey frame: what
  doing nothing scores.
- **SSIM** (Wang et al., 2004), mean over frames.
- **Flicker**: dtSSD (Erofeev et al., "Perceptually Motivated Benchmark for Video Matting", BMVC 2015) of the colours,
  the root mean square over pixels of `(c(t) - c(t - 1)) - (C(t) - C(t - 1))`, c being a and b of the prediction and C
  those of the truth, averaged over frames. It is 0 where colours change as the true ones do; wrong colours that stay as
  they are cost nothing. The flicker of a grey prediction is the change of the true colours.
- **LPIPS** (AlexNet), **FID** and **Inception Score** (in one split, since the frames of a clip are few) are measured
  with networks, whose weights the user gives as files (`ttt_adapt.tasks.colorization.networks`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.colour import rgb_to_lab, to_grey
from ttt_adapt.errors import DataError, FrameError, FrameTypeError, StateError, missing

PSNR_LIMIT = 100.0
"""PSNR of an exact frame, in dB."""
SMALLEST = 11
"""Side of the window of SSIM, in pixels."""
COLOURLESS = 1.0
"""A frame, or a clip, whose mean chroma (in units of a and b) is below this is grey."""


class ColourScore:
    """Collects the scores of one clip, frame by frame.

    Args:
        weights: folder with the networks of LPIPS, FID and Inception Score; None leaves those out.

    Raises:
        DataError: a file of weights is missing.
        MissingPackageError: torchmetrics or torch-fidelity is not installed.
    """

    def __init__(self, weights: Path | None = None) -> None:
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError as error:
            raise missing("torchmetrics", "eval") from error
        self._ssim: Any = structural_similarity_index_measure
        if weights is not None:
            from ttt_adapt.tasks.colorization.networks import Networks

            self._networks: Any = Networks(weights)
        else:
            self._networks = None
        self._squares: list[float] = []
        self._grey: list[float] = []
        self._ssims: list[float] = []
        self._flicker: list[float] = []
        self._chroma: list[float] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def update(self, prediction: np.ndarray, label: np.ndarray) -> float:
        """Adds one frame.

        Args:
            prediction: uint8 RGB [H, W, 3].
            label: the true colours, uint8 RGB [H, W, 3].

        Returns:
            This frame's PSNR in dB.

        Raises:
            FrameTypeError, FrameError: one is no such array, the shapes differ, or a side is below 11 pixels.
        """
        _check(prediction, label)
        self._squares.append(_mean_square(prediction, label))
        self._grey.append(_mean_square(to_grey(label), label))
        ours, truth = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in (prediction, label))
        self._ssims.append(float(self._ssim(ours.float(), truth.float(), data_range=255.0)))
        self._add_colours(ours, truth)
        if self._networks is not None:
            self._networks.update(ours, truth)
        return psnr(self._squares[-1])

    def per_frame(self) -> np.ndarray:
        """PSNR of every frame in dB."""
        return np.array([psnr(value) for value in self._squares])

    def result(self) -> dict[str, Any]:
        """The scores over the clip.

        Raises:
            StateError: no frame was added.
            DataError: the clip has no colours to score against.
        """
        if not self._squares:
            raise StateError("there is nothing to score yet; call update(prediction, label) for every frame first")
        if np.mean(self._chroma) < COLOURLESS:
            raise DataError(f"no colours to score against (mean chroma {np.mean(self._chroma):.2f} in a and b)")
        return {
            "psnr": psnr(float(np.mean(self._squares))),
            "psnr_frames": float(self.per_frame().mean()),
            "psnr_grey": psnr(float(np.mean(self._grey))),
            "ssim": float(np.mean(self._ssims)),
            "flicker": float(np.mean(self._flicker)) if self._flicker else None,
            "frames": len(self._squares),
            **(self._networks.result() if self._networks is not None else {}),
        }

    def _add_colours(self, prediction: Tensor, truth: Tensor) -> None:
        ours, true = (rgb_to_lab(image[0].float() / 255)[1:] for image in (prediction, truth))
        self._chroma.append(_chroma(true))
        if self._last is not None and self._last[0].shape == ours.shape:
            change = (ours - self._last[0]) - (true - self._last[1])
            self._flicker.append(float(change.square().sum(0).mean().sqrt()))
        self._last = ours, true


def psnr(square: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean square error of 8-bit values, at most `PSNR_LIMIT`."""
    return PSNR_LIMIT if square <= 0 else min(20 * math.log10(255) - 10 * math.log10(square), PSNR_LIMIT)


def in_colour(frame: np.ndarray) -> bool:
    """Whether the mean chroma of a frame, uint8 RGB [H, W, 3], is at least `COLOURLESS`."""
    rgb = torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 255
    return _chroma(rgb_to_lab(rgb)[1:]) >= COLOURLESS


def _chroma(ab: Tensor) -> float:
    """Mean over pixels, of [2, H, W]."""
    return float(ab.norm(dim=0).mean())


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def _check(prediction: Any, label: Any) -> None:
    for what, image in (("prediction", prediction), ("label", label)):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
            raise FrameTypeError(f"{what} is a {kind}; expected a uint8 array [H, W, 3]")
        if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SMALLEST:
            raise FrameError(
                f"{what} has shape {image.shape}; expected [H, W, 3], both sides at least {SMALLEST} pixels"
            )
    if prediction.shape != label.shape:
        raise FrameError(f"prediction is {prediction.shape}, label is {label.shape}; expected one shape")
