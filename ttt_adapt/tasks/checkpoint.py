"""Models with their branch in one safetensors file, described well enough to build them again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError, ConfigError, missing
from ttt_adapt.files import atomic_write
from ttt_adapt.objectives import Rotation
from ttt_adapt.objectives.attached import Attached
from ttt_adapt.objectives.mae import MAEBranch, check_state
from ttt_adapt.stream.frames import Normalize
from ttt_adapt.tasks import Task, task_of
from ttt_adapt.tasks.dense_model import SegmentationModel

OBJECTIVES: dict[str, Any] = {"mae": MAEBranch, "rotation": Rotation}
"""What a model can be trained with jointly."""


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint's model is.

    Attributes:
        encoder: timm model name.
        classes: class names in the order of their ids; () for a task without classes.
        size: (H, W) of the training images.
        encoder_options: keywords of `timm.create_model`.
        branch: keywords of `MAEBranch.attach` (or of `Rotation.attach`); None for a model trained for the main task
            alone.
        objective: what it was trained with jointly, "mae" or "rotation".
        palette: one RGB colour per class; () for the default palette.
        mean: per channel, of images in 0..1.
        std: per channel.
        width: inner channels of the head.
        training: how the weights were made, for the record.
        task: what it was trained for, see `ttt_adapt.tasks`.
        task_options: of the task.
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

    def build(self, pretrained: bool = False) -> tuple[SegmentationModel, Attached | None]:
        """The model with fresh (or timm's pretrained) weights, and its branch."""
        model = SegmentationModel(
            self.encoder,
            task_of(self).channels,
            width=self.width,
            pretrained=pretrained,
            encoder_options=self.encoder_options,
        )
        attach = OBJECTIVES[self.objective].attach
        return model, None if self.branch is None else attach(model, "backbone", **self.branch)

    def preprocess(self, device: torch.device | str | None = None) -> Normalize:
        """The normalisation that the model was trained with."""
        return Normalize(self.mean, self.std, device=device)


@dataclass
class Checkpoint:
    """A model in eval mode, its branch (None if it was trained for the main task alone) and what they are."""

    model: SegmentationModel
    branch: Attached | None
    spec: ModelSpec

    @cached_property
    def task(self) -> Task:
        """What the model was trained for."""
        return task_of(self.spec)

    @property
    def mae_branch(self) -> MAEBranch:
        """The reconstruction branch.

        Raises:
            ConfigError: it was trained without one.
        """
        if not isinstance(self.branch, MAEBranch):
            trained = "the main task alone" if self.branch is None else type(self.branch).__name__
            raise ConfigError(
                f"this checkpoint was trained for {trained}: adaptation by reconstruction needs its branch"
            )
        return self.branch


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, half: bool = False) -> None:
    """Write a checkpoint; an existing file stays whole until the new one is complete.

    Args:
        path: a .safetensors file.
        checkpoint: model, branch and spec.
        half: store weights as float16.

    Raises:
        CheckpointError: the file cannot be written.
    """
    weights = {f"model.{name}": value for name, value in checkpoint.model.state_dict().items()}
    if checkpoint.branch is not None:
        weights |= {f"branch.{name}": value for name, value in checkpoint.branch.state_dict().items()}
    if half:
        weights = {name: v.half() if v.is_floating_point() else v for name, v in weights.items()}
    metadata = {"spec": json.dumps(asdict(checkpoint.spec))}
    library = _safetensors()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(library.save({name: v.contiguous() for name, v in weights.items()}, metadata))
    except (OSError, library.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Build the model and branch that `save_checkpoint` wrote, in eval mode.

    Raises:
        CheckpointError: no such file, not a checkpoint of this library, or weights that do not fit its description.
    """
    weights, spec = _read(path, device)
    model, branch = spec.build()
    load_weights(model, weights, "model.", str(path))
    if branch is not None:
        load_weights(branch, weights, "branch.", str(path))
        branch.to(device).eval()
    return Checkpoint(model.to(device).eval(), branch, spec)


def read_spec(path: str | Path) -> ModelSpec:
    """What the model of a checkpoint is, without building it.

    Raises:
        CheckpointError: no such file, or not a checkpoint of this library.
    """
    return _read(path, "cpu")[1]


def load_initial(path: str | Path, checkpoint: Checkpoint) -> None:
    """Start `checkpoint` from another file: its model must be the same; a branch is taken over if there is one.

    Raises:
        CheckpointError: the file is of another task, or its model is another one; the message says which keys differ.
    """
    device = next(checkpoint.model.parameters()).device
    weights, spec = _read(path, device)
    if spec.task != checkpoint.spec.task:
        raise CheckpointError(
            f"{path} was trained for {spec.task}, and its head is of no use to a model for {checkpoint.spec.task}"
        )
    if task_of(spec).channels != checkpoint.task.channels and spec.task_options != checkpoint.spec.task_options:
        given = [f"--task-option {name}={value}" for name, value in spec.task_options.items()]
        raise CheckpointError(
            f"{path} was trained with {' '.join(given) or 'no --task-option'}, which makes another head: give the same"
        )
    load_weights(checkpoint.model, weights, "model.", str(path))
    if checkpoint.branch is not None and spec.branch is not None and spec.objective == checkpoint.spec.objective:
        load_weights(checkpoint.branch, weights, "branch.", str(path))


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str, source: str) -> None:
    """Load the `prefix` part of `weights` into `module`, all or nothing."""
    part = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    check_state(module.state_dict(), part, f"the {prefix[:-1]} of {source}")
    module.load_state_dict(part)


def _read(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], ModelSpec]:
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}: train one with `ttt-adapt train`")
    library = _safetensors()
    try:
        with library.safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = json.loads(metadata["spec"])
        spec = ModelSpec(**{name: _tuples(name, value) for name, value in fields.items()})
    except (KeyError, TypeError, ValueError, OSError, library.SafetensorError) as error:
        raise CheckpointError(f"{path} is no checkpoint written by ttt_adapt: {error}") from error
    floats = {n: v.float() if v.dtype is torch.float16 else v for n, v in weights.items()}
    return floats, spec


def _tuples(name: str, value: Any) -> Any:
    """JSON has lists only: give the spec its tuples back."""
    if name == "palette":
        return tuple(tuple(colour) for colour in value)
    return tuple(value) if name in ("classes", "size", "mean", "std") else value


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise missing("safetensors", "timm") from error

    class Library:
        save = staticmethod(safetensors.torch.save)
        safe_open = staticmethod(safetensors.safe_open)
        SafetensorError = safetensors.SafetensorError

    return Library
