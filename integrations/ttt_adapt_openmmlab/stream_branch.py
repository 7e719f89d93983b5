"""The branch that a stream adapts with: that of a `JointMAE`, or a new one with the weights of a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ttt_adapt import MAEBranch
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt_openmmlab.decoders import branch_for
from ttt_adapt_openmmlab.joint import BRANCH, find_branch, plain_model, saved_calibration


def branch_for_stream(model: nn.Module, keywords: Mapping[str, Any] | None, seed: int) -> MAEBranch:
    """The branch of a `JointMAE` model, or a new one on the plain model; the model itself does not change.

    Args:
        model: as the runner has it.
        keywords: None for the model's own branch; else see `branch_settings`, and `checkpoint`.
        seed: for the weights of a new decoder, so that all processes have the same.

    Raises:
        ConfigError: the model has no branch.
        EncoderError, CheckpointError: the branch cannot be attached, or the checkpoint is of another one.
    """
    plain = plain_model(model)
    if keywords is None:
        found = find_branch(model)
        if found is None:
            raise ConfigError(
                f"{type(plain).__name__} has no reconstruction branch to adapt with: wrap it as "
                "model=dict(type='JointMAE', model=..., branch=...), or give the hook "
                "branch=dict(checkpoint='file of a JointMAE run'). Without a branch there are arm='calibrated', "
                "stills=40 in the hook, and stream_adapter(model, calibration=calibrate(model, images)) in a script"
            )
        return found
    keywords = dict(keywords)
    checkpoint = keywords.pop("checkpoint", None)
    with torch.random.fork_rng(devices=[]):  # the random numbers of the run stay the same
        torch.random.default_generator.manual_seed(seed)
        branch = branch_for(plain, **keywords)
    if checkpoint is None:
        print_log("the hook's branch has no checkpoint: its decoder is untrained", "current", logging.WARNING)
    else:
        weights = _joint_weights(checkpoint)
        branch.load_state_dict(branch_part(weights))
        branch.calibration = saved_calibration(weights)
    return branch


def branch_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The branch's part of the weights of a `JointMAE`."""
    return {name.removeprefix(BRANCH): value for name, value in state.items() if name.startswith(BRANCH)}


def _joint_weights(path: str) -> dict[str, Tensor]:
    """The weights of a `JointMAE` in a file.

    Raises:
        CheckpointError: there is no such file, or it holds no branch.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the branch's checkpoint {path} does not exist; expected the file or URL of a JointMAE run"
        ) from error
    weights: dict[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    if not branch_part(weights):
        raise CheckpointError(f"{path} holds no weights under {BRANCH!r}; expected a checkpoint of JointMAE")
    return weights
