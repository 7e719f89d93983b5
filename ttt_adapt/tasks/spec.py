"""What a checkpoint's model is, in plain values: `ModelSpec`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.frames import Normalize
from ttt_adapt.schema import check_fields, dict_of, list_of, number, optional, plain, read_json, text, whole


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
    def of_json(cls, content: str, source: str = "the description") -> ModelSpec:
        """The description that `to_json` wrote; `source` is named in messages.

        Raises:
            CheckpointError: `content` is no such description.
        """
        values = read_json(content, source)
        check_fields(values, _FIELDS, source, required=("encoder", "classes", "size"))
        spec = cls(**{name: _with_tuples(name, value) for name, value in values.items()})
        if 0 < len(spec.palette) < len(spec.classes):
            raise CheckpointError(
                f"{source} has {len(spec.palette)} colours for {len(spec.classes)} classes; expected one for each"
            )
        return spec

    def to_json(self) -> str:
        """The description as text, for the metadata of a checkpoint."""
        return json.dumps(asdict(self))

    def preprocess(self, device: torch.device | str | None = None) -> Normalize:
        """The normalisation that the model was trained with."""
        return Normalize(self.mean, self.std, device=device)


_SIDE = whole(1, 2**16)
_OPTIONS = dict_of(plain)
_FIELDS = {
    "encoder": text,
    "classes": list_of(text, most=2**16),
    "size": list_of(_SIDE, 2, 2),
    "encoder_options": _OPTIONS,
    "branch": optional(_OPTIONS),
    "objective": text,
    "palette": list_of(list_of(whole(0, 255), 3, 3)),
    "mean": list_of(number(-3.0, 3.0), 3, 3),
    "std": list_of(number(1e-6, 3.0), 3, 3),
    "width": _SIDE,
    "training": list_of(_OPTIONS),
    "task": text,
    "task_options": _OPTIONS,
}
"""What the fields of a description in a file hold."""


def _with_tuples(name: str, value: Any) -> Any:
    """The value of a field with its tuples, which JSON writes as lists."""
    if name == "palette":
        return tuple(tuple(colour) for colour in value)
    return tuple(value) if name in ("classes", "size", "mean", "std") else value
