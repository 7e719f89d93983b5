"""Checkpoints: a model, its branch and their description in one safetensors file; how to build, save and load them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError, ConfigError, TTTAdaptError, missing, warn
from ttt_adapt.file_kind import refuse_other_kind
from ttt_adapt.files import atomic_write, check_format_number, check_path
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.calibration_file import OUTDATED, is_outdated
from ttt_adapt.model.parameters import check_state, dense
from ttt_adapt.objectives.base import Attached
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.objectives.rotation import Rotation
from ttt_adapt.schema import shown
from ttt_adapt.tasks.base import Task
from ttt_adapt.tasks.dense_model import DenseModel
from ttt_adapt.tasks.described import check_described
from ttt_adapt.tasks.lookup import task_of
from ttt_adapt.tasks.pretrained import Pretrained
from ttt_adapt.tasks.spec import ModelSpec

OBJECTIVES: dict[str, Any] = {"mae": MAEBranch, "rotation": Rotation}
"""The self-supervised tasks that a model can be trained with jointly, by name."""
FORMAT = 1
"""Number of the layout of checkpoints, in their metadata. Files without a number have the same layout."""


def build_model(spec: ModelSpec, pretrained: Pretrained | None = None) -> tuple[DenseModel, Attached | None]:
    """A model of this description with its branch (None without one).

    Args:
        spec: what to build.
        pretrained: weights that the encoder starts from; None for random ones.
    """
    model = DenseModel(
        spec.encoder,
        task_of(spec).channels,
        width=spec.width,
        pretrained=pretrained,
        encoder_options=spec.encoder_options,
    )
    attach = OBJECTIVES[spec.objective].attach
    return model, None if spec.branch is None else attach(model, "backbone", **spec.branch)


def build_described(spec: ModelSpec, weights: dict[str, Tensor], source: str) -> tuple[DenseModel, Attached | None]:
    """As `build_model`, of a description that came with weights in a file.

    Raises:
        CheckpointError: the description cannot be that of the weights, or nothing can be built of it.
        ConfigError, EncoderError: it names an encoder, a task or a branch that cannot be made here.
    """
    check_described(spec, weights, OBJECTIVES, source)
    try:
        return build_model(spec)
    except TTTAdaptError:
        raise
    except Exception as error:  # encoders and branches raise all kinds of errors over their options
        raise CheckpointError(
            f"{source} describes a model that cannot be built ({type(error).__name__}: {error}): the file is damaged, "
            "or of another version of timm"
        ) from error


@dataclass
class Checkpoint:
    """A model in eval mode, its branch (None if it was trained for the main task alone), and their description.

    Attributes:
        model: as it was trained.
        branch: on the model.
        spec: what both are.
        calibration: what the model is like on its own ground; None before it was calibrated.
    """

    model: DenseModel
    branch: Attached | None
    spec: ModelSpec
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branch, MAEBranch):
            self.calibration = self.branch.calibration = self.calibration or self.branch.calibration

    @cached_property
    def task(self) -> Task:
        """The task that the model was trained for."""
        return task_of(self.spec)

    @property
    def mae_branch(self) -> MAEBranch:
        """The reconstruction branch.

        Raises:
            ConfigError: the model was trained without one.
        """
        if not isinstance(self.branch, MAEBranch):
            trained = "the main task alone" if self.branch is None else type(self.branch).__name__
            raise ConfigError(
                f"this checkpoint was trained for {trained}; adaptation by reconstruction needs one with an MAE "
                "branch: train it with the recipe 'joint'"
            )
        return self.branch


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, half: bool = False) -> None:
    """Write a checkpoint. An existing file stays as it is until the new one is complete.

    Args:
        path: a .safetensors file.
        checkpoint: what to write.
        half: store floating-point weights as float16.

    Raises:
        CheckpointError: the file cannot be written, or as for `check_can_be_saved`.
    """
    weights = check_can_be_saved(checkpoint)
    metadata = {"format": str(FORMAT), "spec": checkpoint.spec.to_json()}
    if half:
        weights = {name: v.half() if v.is_floating_point() else v for name, v in weights.items()}
    own = checkpoint.branch.calibration if isinstance(checkpoint.branch, MAEBranch) else None
    _write(path, weights, metadata, own or checkpoint.calibration)


def check_can_be_saved(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of model and branch by their names in a file; to be called before a training, too.

    Raises:
        CheckpointError: something in their states is no ordinary tensor.
    """
    weights = {f"model.{name}": value for name, value in checkpoint.model.state_dict().items()}
    if checkpoint.branch is not None:
        weights |= {f"branch.{name}": value for name, value in checkpoint.branch.state_dict().items()}
    if strange := [name for name, value in weights.items() if not isinstance(value, Tensor) or not dense(value)]:
        raise CheckpointError(
            f"{strange[0]} is {shown(weights[strange[0]])}, which a checkpoint cannot hold: expected ordinary tensors "
            "in the states of model and branch"
        )
    return weights


def write_calibration(source: str | Path, calibration: Calibration, out: str | Path | None = None) -> None:
    """Write a checkpoint's file with this calibration; weights and description stay, bit for bit.

    Args:
        source: the checkpoint.
        calibration: of its weights.
        out: where to write; None: into `source`, which stays as it is until the new file is complete.

    Raises:
        CheckpointError: as for `load_checkpoint`, or the file cannot be written.
    """
    weights, metadata = _raw(source, "cpu")
    kept = {name: value for name, value in weights.items() if not name.startswith("calibration.")}
    _write(source if out is None else out, kept, metadata, calibration)


def _write(
    path: str | Path, weights: dict[str, Tensor], metadata: dict[str, str], calibration: Calibration | None
) -> None:
    """Write a whole checkpoint, atomically."""
    if calibration is not None:  # never as float16: the divergence of a channel can be larger than it holds
        metadata = {**metadata, "calibration": calibration.to_json()}
        weights = weights | {f"calibration.{name}": value for name, value in calibration.tensors().items()}
    library = _safetensors()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(library.save(_apart(weights), metadata))
    except (OSError, ValueError, KeyError, library.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, each in memory of its own: layers that share one are written with it, once for each name."""
    taken: set[int] = set()
    found = {}
    for name, value in weights.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone(memory_format=torch.contiguous_format) if place in taken else value.contiguous()
        taken |= {place, found[name].untyped_storage().data_ptr()}
    return found


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Build the model and the branch that `save_checkpoint` wrote, in eval mode.

    Raises:
        CheckpointError: there is no such file, it is not of this library or of a newer version, or its weights do not
            fit its description.
        ConfigError, EncoderError: the description names an encoder, a task or a branch that cannot be made here.
    """
    weights, spec, text = _read(path, device)
    model, branch = build_described(spec, weights, str(path))
    load_weights(model, weights, "model.", str(path))
    calibration = _calibration(weights, text, str(path))
    if branch is not None:
        load_weights(branch, weights, "branch.", str(path))
        branch.to(device).eval()
    if isinstance(branch, MAEBranch):
        branch.calibration = calibration
    return Checkpoint(model.to(device).eval(), branch, spec, calibration)


def read_spec(path: str | Path) -> ModelSpec:
    """The description of a checkpoint's model, without building the model.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    return _read(path, "cpu")[1]


def read_calibration(path: str | Path) -> Calibration | None:
    """The calibration in a checkpoint, without building the model; None where it is not calibrated.

    Raises:
        CheckpointError: as for `load_checkpoint`.
    """
    weights, _, text = _read(path, "cpu")
    return _calibration(weights, text, str(path))


def _calibration(weights: dict[str, Tensor], text: str | None, source: str) -> Calibration | None:
    """The calibration of a checkpoint; None where there is none, or one that an earlier version made."""
    if text is None:
        return None
    if is_outdated(text, source):
        warn(f"{source} {OUTDATED}, and is used without it: `ttt-adapt calibrate` makes one that fits")
        return None
    return Calibration.of_tensors(_part(weights, "calibration."), text, source)


def load_initial(path: str | Path, checkpoint: Checkpoint) -> None:
    """Load the weights of another file into `checkpoint`: of the model, and of the branch if both have the same kind.

    Raises:
        CheckpointError: the file is of another task, or of another model; the message says which keys differ.
    """
    device = next(checkpoint.model.parameters()).device
    weights, spec, _ = _read(path, device)
    if spec.task != checkpoint.spec.task:
        raise CheckpointError(
            f"{path} was trained for {spec.task}, and its head is of no use to a model for {checkpoint.spec.task}"
        )
    if task_of(spec).channels != checkpoint.task.channels and spec.task_options != checkpoint.spec.task_options:
        given = [f"{name}={value}" for name, value in spec.task_options.items()]
        raise CheckpointError(
            f"{path} was trained with {', '.join(given) or 'none'} as task options, which makes another head: "
            "give the same"
        )
    branch = checkpoint.branch if spec.branch is not None and spec.objective == checkpoint.spec.objective else None
    modules = {"model.": checkpoint.model, "branch.": branch}
    for prefix, module in modules.items():
        if module is not None:
            check_weights(module, weights, prefix, str(path))
    for prefix, module in modules.items():
        if module is not None:
            load_weights(module, weights, prefix, str(path))


def check_weights(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    """The part of `weights` whose names begin with `prefix`, without it, if `module` can load it.

    Raises:
        CheckpointError: names or shapes differ; the message says which, and `source` is named in it.
    """
    part = _part(weights, prefix)
    check_state(module.state_dict(), part, f"the {prefix[:-1]} of {source}")
    return part


def load_weights(module: torch.nn.Module, weights: dict[str, Tensor], prefix: str, source: str) -> None:
    """Load the part of `weights` whose names begin with `prefix` into `module`; if one does not fit, load nothing.

    Raises:
        CheckpointError: as for `check_weights`.
    """
    module.load_state_dict(check_weights(module, weights, prefix, source))


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _read(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], ModelSpec, str | None]:
    """Weights, description, and the calibration's text; None without one."""
    weights, metadata = _raw(path, device)
    floats = {n: v.float() if v.dtype is torch.float16 else v for n, v in weights.items()}
    return floats, ModelSpec.of_json(metadata["spec"], f"the description in {path}"), metadata.get("calibration")


def _raw(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint as they are in the file; the description can be read."""
    check_path(path, "checkpoint", CheckpointError)
    check_is_checkpoint(path)
    library = _safetensors()
    try:
        with library.safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_format_number(int(metadata.get("format", FORMAT)), FORMAT, path)
        if "spec" not in metadata:
            raise CheckpointError(
                f"{path} is no checkpoint written by ttt_adapt: it holds weights without the description of a model; "
                "expected a file of `ttt-adapt train`"
            )
        ModelSpec.of_json(metadata["spec"], f"the description in {path}")
    except CheckpointError:
        raise
    except Exception as error:  # a broken file can raise any error
        raise CheckpointError(
            f"{path} is no checkpoint written by ttt_adapt ({error}); expected a .safetensors file of `ttt-adapt train`"
        ) from error
    parts = ("model.", "branch.", "calibration.")
    if other := [name for name, value in weights.items() if not name.startswith(parts) or not dense(value)]:
        raise CheckpointError(f"{path} holds {shown(other[0])}, which is no part of a checkpoint: it is damaged")
    return weights, metadata


def check_is_checkpoint(path: str | Path) -> None:
    """Refuse what cannot be a checkpoint, by its first bytes.

    Raises:
        CheckpointError: it is not there, or is another kind of file.
    """
    if not Path(path).exists():
        raise CheckpointError(f"there is no checkpoint {path}: train one with `ttt-adapt train`")
    refuse_other_kind(path, ("checkpoint", "safetensors"), "no checkpoint written by ttt_adapt", CheckpointError)


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
