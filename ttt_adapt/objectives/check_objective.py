"""The objective that a stream is adapted with: one that the user made, or a new `MAEBranch`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, nearest, warn
from ttt_adapt.model.wrappers import check_module, outermost
from ttt_adapt.objectives.base import Objective
from ttt_adapt.objectives.mae import MAEBranch


def check_objective(
    model: nn.Module,
    branch: Objective | None,
    attach: Mapping[str, Any],
    needed: bool = True,
    others: Collection[str] = (),
) -> None:
    """Check what `StreamAdapter` was given, before anything changes.

    Args:
        model: the user's model.
        branch: an objective on it, or None.
        attach: keywords of `MAEBranch.attach` for a new branch; they belong with `branch=None`.
        needed: whether the stream cannot do without an objective.
        others: the keywords that `StreamAdapter` takes beside these.

    Raises:
        ConfigError: no model, neither (where one is needed) or both of `branch` and keywords for a new one, a branch
            of another model, or an unknown keyword.
    """
    check_module(model)
    if branch is not None and not isinstance(branch, Objective):
        raise ConfigError(
            f"branch is a {type(branch).__name__}; expected an MAEBranch or another Objective. To name the encoder, "
            "write StreamAdapter(model, encoder=...)"
        )
    known = [name for name in inspect.signature(MAEBranch.attach).parameters if name != "model"]
    for name in sorted(set(attach) - set(known)):
        raise ConfigError(
            f"{name!r}: unknown keyword; {nearest(name, [*others, *known])}. StreamAdapter takes keywords of its own "
            "and those of MAEBranch.attach"
        )
    if branch is None and not attach and needed:
        raise ConfigError(
            'pass a branch from MAEBranch.attach(model), or encoder="auto" to attach one here, or '
            "calibration=calibrate(model, stills) to go without one"
        )
    if branch is not None and attach:
        raise ConfigError(
            f"a branch was given, and {', '.join(attach)} for MAEBranch.attach, which makes a new branch: pass only one"
        )
    if branch is not None:
        check_attached(model, branch)


def check_attached(model: nn.Module, branch: Objective) -> nn.Module:
    """Check that an objective is on this model, on a part of it, or on a wrapper around it.

    Returns:
        The outermost of both: the model, or the wrapper around it that the objective is attached to.

    Raises:
        ConfigError: it is on another model; the message says how to keep what it learned.
    """
    if (outer := outermost(model, branch.model)) is not None:
        return outer
    raise ConfigError(of_another_model(model, branch))


def of_another_model(model: nn.Module, branch: Objective) -> str:
    """For an error: an objective is on another model, and how to keep what it learned."""
    return (
        f"the branch is attached to another model: to a {type(branch.model).__name__} that is neither this "
        f"{type(model).__name__} nor inside of it. To keep what the branch learned, pass the model that it is attached "
        "to, branch.model; or copy both at once, model, branch = copy.deepcopy((model, branch)); or attach a new "
        f"branch to this model in the same way, new = {type(branch).__name__}.attach(model, ...), and then "
        "new.load_state_dict(branch.state_dict())"
    )


def warn_if_untrained(branch: Objective, config: StreamConfig) -> None:
    """Warn of gradient steps on an objective whose own layers are as they were drawn."""
    if getattr(branch, "untrained", False) and config.lr and config.iterations:
        warn(
            f"this {type(branch).__name__} was never trained: its own layers are as they were drawn, and what they ask "
            "of the encoder is noise. Train model and branch together first, with ttt_adapt.fit or `ttt-adapt train`, "
            "or load a trained branch with branch.load_state_dict(...)"
        )
