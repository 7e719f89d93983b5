"""The objective that a stream is adapted with: one that the user made, or a new `MAEBranch`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.objectives.base import Objective
from ttt_adapt.objectives.mae import MAEBranch


def check_objective(model: nn.Module, branch: Objective | None, attach: Mapping[str, Any], needed: bool = True) -> None:
    """Check what `StreamAdapter` was given, before anything changes.

    Args:
        model: the user's model.
        branch: an objective on it, or None.
        attach: keywords of `MAEBranch.attach` for a new branch; they belong with `branch=None`.
        needed: whether the stream cannot do without an objective.

    Raises:
        ConfigError: no model, neither (where one is needed) or both of `branch` and keywords for a new one, a branch
            of another model, or an unknown keyword.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if branch is not None and not isinstance(branch, Objective):
        raise ConfigError(
            f"branch is a {type(branch).__name__}; expected an MAEBranch or another Objective. To name the encoder, "
            "write StreamAdapter(model, encoder=...)"
        )
    if branch is None and not attach and needed:
        raise ConfigError(
            'pass a branch from MAEBranch.attach(model), or encoder="auto" to attach one here, or '
            "calibration=calibrate(model, stills) to go without one"
        )
    unknown = set(attach) - set(inspect.signature(MAEBranch.attach).parameters)
    if unknown:
        raise ConfigError(f"{', '.join(map(repr, sorted(unknown)))}: unknown; expected keywords of MAEBranch.attach")
    if branch is not None and attach:
        raise ConfigError(
            f"a branch was given, and {', '.join(attach)} for MAEBranch.attach, which makes a new branch: pass only one"
        )
    if branch is not None and branch.model is not model:
        raise ConfigError("the branch is attached to another model: attach one to this model")
