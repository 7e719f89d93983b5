"""Build the model that a checkpoint describes, and nothing larger than what the checkpoint holds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError, TTTAdaptError
from ttt_adapt.model.parameters import check_state
from ttt_adapt.schema import shown
from ttt_adapt.tasks.dense_model import DenseModel
from ttt_adapt.tasks.lookup import task_of
from ttt_adapt.tasks.spec import ModelSpec

LARGEST_PATCH = 256
"""Side in pixels of the largest mask patch that a file may name."""
LARGEST_SIDE = 4096
"""Side in pixels of the largest image that a file may want a model to be examined with."""
_LOADS = ("pretrained", "features_only", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Keywords of `timm.create_model` that read other files, or are given already."""


def check_described(spec: ModelSpec, weights: dict[str, Tensor], objectives: dict[str, Any], source: str) -> None:
    """Refuse a description that these weights cannot be of, before memory is taken for its model.

    Args:
        spec: what a checkpoint says that its model is.
        weights: by name, of the whole file.
        objectives: by name, the classes of branches.
        source: the file, for messages.

    Raises:
        CheckpointError: numbers in it are too large for the weights, it has keywords of no use, or the weights of the
            model do not fit it.
        ConfigError: the task or the encoder is not known.
    """
    if spec.objective not in objectives:
        raise CheckpointError(f"{source} has the objective {shown(spec.objective)}; expected {', '.join(objectives)}")
    if other := [name for name in spec.encoder_options if name in _LOADS]:
        raise CheckpointError(f"{source} has {other[0]} among the options of its encoder, which is no part of a model")
    keywords = inspect.signature(objectives[spec.objective].attach).parameters.keys() - {"model", "encoder"}
    if other := [name for name in spec.branch or () if name not in keywords]:
        raise CheckpointError(f"{source} has {shown(other[0])} among the settings of its branch, which has none such")
    for name, most in (("patch_size", LARGEST_PATCH), ("image_size", LARGEST_SIDE)):
        _check_numbers((spec.branch or {}).get(name), most, f"{source}: {name}")
    largest = max((side for tensor in weights.values() for side in tensor.shape), default=0)
    _check_numbers(spec.encoder_options, max(largest, LARGEST_SIDE), f"{source}: encoder_options")
    deep = {name: value for name, value in spec.encoder_options.items() if _is_depth(name)}
    _check_numbers(deep, len(weights), f"{source}: encoder_options")
    _check_numbers([spec.width], largest, f"{source}: width")
    _check_without_memory(spec, weights, source)


def _is_depth(name: str) -> bool:
    """Whether an option says how many blocks there are."""
    return any(word in name for word in ("depth", "layers", "blocks", "stages"))


def _check_numbers(value: Any, most: int, what: str) -> None:
    """Refuse a number anywhere in a nested value that is larger than the largest that can be meant."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, int | float) and not abs(value) <= most:
        raise CheckpointError(f"{what} has {shown(value)}; with the weights in this file it is at most {most}")
    for item in inside:
        _check_numbers(item, most, what)


def _check_without_memory(spec: ModelSpec, weights: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes with those of the model, which is made without memory for them, where it can be."""
    channels = task_of(spec).channels
    try:
        with torch.device("meta"):
            model = DenseModel(spec.encoder, channels, width=spec.width, encoder_options=spec.encoder_options)
        own = model.state_dict()
    except TTTAdaptError:
        raise
    except Exception:  # some encoders compute with numbers while they are made: they are compared when they are there
        return
    part = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    check_state(own, part, f"the model of {source}")
