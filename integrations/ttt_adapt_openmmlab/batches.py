"""What the hook takes from a run of MMEngine: its branch, its preprocessing, and the one frame of a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ttt_adapt import MAEBranch
from ttt_adapt.errors import CheckpointError, ConfigError, FrameError
from ttt_adapt_openmmlab.datasets.samplers import file_of
from ttt_adapt_openmmlab.decoders import branch_for
from ttt_adapt_openmmlab.joint import BRANCH, find_branch, plain_model


def branch_for_stream(model: nn.Module, keywords: Mapping[str, Any] | None, seed: int) -> MAEBranch:
    """The branch of a `JointMAE` model, or a new one on the plain model; the model stays as it is.

    Args:
        model: as the runner has it.
        keywords: None for the model's own branch; else see `branch_settings`, and `checkpoint`.
        seed: of a new decoder's weights, so that every process has the same.

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
                "branch=dict(checkpoint='file of a JointMAE run')"
            )
        return found
    keywords = dict(keywords)
    checkpoint = keywords.pop("checkpoint", None)
    with torch.random.fork_rng(devices=[]):  # the run's own draws stay as they are
        torch.random.default_generator.manual_seed(seed)
        branch = branch_for(plain, **keywords)
    if checkpoint is None:
        print_log("the hook's branch has no checkpoint: its decoder is untrained", "current", logging.WARNING)
    else:
        branch.load_state_dict(_branch_weights(checkpoint))
    return branch


def branch_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The branch's part of the weights of a `JointMAE`."""
    return {name.removeprefix(BRANCH): value for name, value in state.items() if name.startswith(BRANCH)}


def _branch_weights(path: str) -> dict[str, Tensor]:
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the branch's checkpoint {path} does not exist; expected the file or URL of a JointMAE run"
        ) from error
    weights = branch_part(checkpoint.get("state_dict", checkpoint))
    if not weights:
        raise CheckpointError(f"{path} holds no weights under {BRANCH!r}; expected a checkpoint of JointMAE")
    return weights


def only_sample(data_batch: Any) -> Any:
    """The data sample of a batch of one frame.

    Raises:
        ConfigError: a batch of several frames, of several views of one, or of a flipped one.
    """
    if not isinstance(data_batch, Mapping) or not data_batch.get("data_samples"):
        raise ConfigError(
            f"the test dataloader gave a {type(data_batch).__name__} without data_samples; expected a dict of inputs "
            "and data_samples: end the test pipeline with PackSegInputs or PackDetInputs"
        )
    inputs, samples = data_batch["inputs"], data_batch["data_samples"]
    if isinstance(inputs[0], list | tuple) or isinstance(samples[0], list | tuple):
        raise ConfigError("the test pipeline makes several views of a frame (TestTimeAug); a stream has one")
    if len(samples) != 1 or len(inputs) != 1:
        raise ConfigError(f"a batch of {len(samples)} frames came; a stream goes frame by frame: set batch_size=1")
    if samples[0].metainfo.get("flip"):
        raise ConfigError(f"{file_of(samples[0].metainfo)} was flipped by the test pipeline: take the flip out")
    return samples[0]


def images(preprocessor: nn.Module, data_batch: Mapping[str, Any]) -> Tensor:
    """What the model's own preprocessing makes of a copy of the batch, without its labels: float [1, 3, H, W].

    Raises:
        FrameError: it makes something else; the message names the file.
    """
    sample = only_sample(data_batch)
    copy = {
        "inputs": [image.clone() for image in data_batch["inputs"]],
        "data_samples": [type(sample)(metainfo=sample.metainfo)],
    }
    x = preprocessor(copy, False)["inputs"]
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[:2] != (1, 3) or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise FrameError(
            f"{file_of(sample.metainfo)}: the model's data_preprocessor made {got} of it; expected float [1, 3, H, W], "
            "as SegDataPreProcessor and DetDataPreprocessor give"
        )
    return x
