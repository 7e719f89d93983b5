"""The calibration of a model in MMEngine's runner: from a file, from the branch, or made of the training set."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from torch import nn

from ttt_adapt import Calibration, MAEBranch, StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab.calibration import calibrate
from ttt_adapt_openmmlab.frames import Frames
from ttt_adapt_openmmlab.joint import find_branch, plain_model
from ttt_adapt_openmmlab.stills import training_images


def known_calibration(
    model: nn.Module, branch: MAEBranch | None, file: str | None, config: StreamConfig
) -> Calibration | None:
    """The calibration that is there before the run; None without one, or where the configuration uses none.

    Args:
        model: as the runner has it.
        branch: what the stream is adapted with.
        file: that `Calibration.save` wrote; it wins over those of branches.
        config: of the stream.

    Raises:
        CheckpointError: the file is no calibration.
    """
    if config.norm_stats not in ("auto", "calibrated"):
        return None
    if file is not None:
        return Calibration.load(file)
    branch = find_branch(model) if branch is None else branch
    return None if branch is None else branch.calibration


def fits(calibration: Calibration | None, model: nn.Module) -> bool:
    """Whether there is a calibration, and of the weights that the model has."""
    try:
        if calibration is not None:
            calibration.check(model)
    except ConfigError:
        return False
    return calibration is not None


def stills_of(runner: Any, count: int) -> tuple[list[str], Config]:
    """Images of the runner's training set, and the config whose test pipeline they go through.

    Raises:
        ConfigError: no training set or test pipeline, or too few images.
        DataError: a file is no image.
    """
    cfg = runner.cfg
    paths = training_images(cfg, count)
    if cfg.get("test_dataloader") is not None:  # its pipeline and not that for images in a script
        cfg = Config({"default_scope": cfg.get("default_scope"), "test_dataloader": cfg.test_dataloader})
    Frames(plain_model(runner.model), cfg)  # raises where this is no pipeline for one image
    return paths, cfg


def made_calibration(runner: Any, branch: MAEBranch | None, count: int) -> Calibration:
    """Calibrate the runner's model on images of its training set, as its test pipeline makes them.

    Args:
        runner: of MMEngine.
        branch: on the plain model; it keeps the calibration.
        count: how many images.

    Raises:
        ConfigError, DataError: as in `stills_of`.
    """
    paths, cfg = stills_of(runner, count)
    runner.logger.info(f"calibrate on {len(paths)} images of the training set")
    found = calibrate(plain_model(runner.model), paths, branch=branch, cfg=cfg)
    runner.logger.info(f"calibrated: {found.rule}")
    return found
