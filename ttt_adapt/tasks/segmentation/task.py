"""Semantic segmentation as a task: the model gives class scores, the prediction is a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip
from ttt_adapt.data.layouts import open_clips
from ttt_adapt.errors import ConfigError
from ttt_adapt.tasks.base import Criterion, Metric, Stills, Task
from ttt_adapt.tasks.segmentation.palette import find_palette
from ttt_adapt.tasks.segmentation.score import SegmentationScore
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.view.overlay import blend, default_palette


class Segmentation(Task):
    """A `Task`: class scores [B, classes, H, W], a prediction [H, W] of class ids, mIoU."""

    name = "segmentation"
    metrics = tuple(
        Metric(field, title, "%", "points", 100.0, change="percent", note=note)
        for field, title, note in (
            ("miou", "mIoU", ""),
            ("miou_frames", "frame mIoU", ""),
            ("j", "J", "J is DAVIS' region similarity of the foreground, over the clip and per frame."),
            ("j_frames", "frame J", ""),
        )
    )
    class_metric = Metric("per_class", "IoU", "%", "points", 100.0)
    about = "mIoU over the whole clip; frame mIoU is the mean over frames"
    augment = Augment()
    outputs = "class scores"
    distribution = keeps_classes = labelled = True
    source = "frame"

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]] = ()) -> None:
        self._classes = tuple(classes)
        self.palette: np.ndarray = np.asarray(palette or default_palette(len(self._classes)), dtype=np.uint8)

    @classmethod
    def of(cls, spec: ModelSpec) -> Segmentation:
        """The task of a checkpoint with these classes."""
        if spec.task_options:
            raise ConfigError(
                f"task_options has {next(iter(spec.task_options))!r}; segmentation has no options: leave it out"
            )
        return cls(spec.classes, spec.palette)

    @property
    def channels(self) -> int:
        """One per class."""
        return len(self._classes)

    @classmethod
    def stills(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None
    ) -> Stills:
        """The labelled frames of the clips under `data`, and the colours of their classes; see `open_clips`."""
        clips = open_clips(data, list(names) or None, size, classes=classes)
        height, width = size or clips[0][0][1].shape
        return Stills(clips, (height, width), clips[0].classes, find_palette(data, clips))

    @classmethod
    def clips(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None, format: str
    ) -> list[Clip]:
        """Labelled clips; see `open_clips`."""
        return open_clips(data, list(names) or None, size, classes=classes, format=format)

    @classmethod
    def adopt(cls, clip: Clip) -> Clip:
        """The clip as it is."""
        return clip

    def sample(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The image and its class ids."""
        return image, labels

    def criterion(self, samples: Any) -> Criterion:
        """Cross-entropy over labelled pixels; 0 where a batch has none."""
        ignore: int = samples.ignore

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            total = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
            return total / (labels != ignore).sum().clamp_min(1)

        return loss

    def see(self, frame: np.ndarray) -> np.ndarray:
        """The frame as it is."""
        return frame

    def predict(self, output: Tensor, frame: np.ndarray) -> np.ndarray:
        """The most likely class of every pixel of the frame, [H, W]; uint8 up to 256 classes, else int32."""
        kind = torch.uint8 if output.shape[1] <= 256 else torch.int32
        return resize_labels(output.argmax(1)[0].to(kind).cpu().numpy(), frame.shape[:2])

    def draw(self, frame: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The classes' colours over the frame."""
        return blend(frame, prediction, self.palette, ignore=None)

    def score(self, ignore: int = 255, weights: Path | None = None) -> SegmentationScore:
        """An empty score of IoU.

        Raises:
            ConfigError: `weights` is given; no metric of segmentation needs them.
        """
        if weights is not None:
            raise ConfigError(
                f"metric weights are {weights}; no metric of segmentation is measured with a network: leave them out"
            )
        return SegmentationScore(self.channels, ignore, self._classes)


def resize_labels(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Class ids [h, w] at another size, [H, W]: every pixel takes the nearest one."""
    if labels.shape == tuple(size):
        return labels
    rows = (np.arange(size[0]) * labels.shape[0]) // size[0]
    cols = (np.arange(size[1]) * labels.shape[1]) // size[1]
    return labels[rows[:, None], cols[None, :]]
