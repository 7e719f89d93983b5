"""What a checkpoint's model is, in plain values: `ModelSpec`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ttt_adapt.model.frames import Normalize


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint's model is.

    Attributes:
        encoder: timm model name.
        classes: class names, in the order of their ids; () for a task without classes.
        size: (H, W) of the training images.
        encoder_options: keywords of `timm.create_model`.
        branch: keywords of `MAEBranch.attach` (or of `Rotation.attach`); None for a model that was trained for the main
            task alone.
        objective: the self-supervised task that it was trained with jointly: "mae" or "rotation".
        palette: one RGB colour per class; () for the default colours.
        mean: mean of each channel, of images in [0, 1], that is subtracted.
        std: standard deviation of each channel, that is divided by.
        width: inner channels of the head.
        training: settings of each training so far, for the record.
        task: name of the main task, see `ttt_adapt.tasks`.
        task_options: options of the main task.
    """

    encoder: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    encoder_options: dict[str, Any] = field(default_factory=dict)
    branch: dict[str, Any] | None = None
    objective: str = "mae"
    palette: tuple[tuple[int, int, int], ...] = ()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    width: int = 64
    training: list[dict[str, Any]] = field(default_factory=list)
    task: str = "segmentation"
    task_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_json(cls, text: str) -> ModelSpec:
        """The description that `to_json` wrote.

        Raises:
            ValueError, TypeError: `text` is no such description.
        """
        return cls(**{name: _with_tuples(name, value) for name, value in json.loads(text).items()})

    def to_json(self) -> str:
        """The description as text, for the metadata of a checkpoint."""
        return json.dumps(asdict(self))

    def preprocess(self, device: torch.device | str | None = None) -> Normalize:
        """The normalisation that the model was trained with."""
        return Normalize(self.mean, self.std, device=device)


def _with_tuples(name: str, value: Any) -> Any:
    """The value of a field with its tuples, which JSON writes as lists."""
    if name == "palette":
        return tuple(tuple(colour) for colour in value)
    return tuple(value) if name in ("classes", "size", "mean", "std") else value
