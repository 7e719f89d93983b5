"""What an adapter borrows from the user's model: checked before, given back as it was."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.objectives.base import Objective, StatefulObjective
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.stream.source import Snapshot

_lent: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()
"""Models that have an adapter, and what it changes."""


def lend(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Note that an adapter of `model` changes these tensors, until `give_back`."""
    _lent[model] = [weakref.ref(tensor) for tensor in tensors.values()]


def check_free(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to change what an adapter of another model changes already.

    Args:
        tensors: name -> what the new adapter would change.

    Raises:
        StateError: the models, or their branches, share some of it.
    """
    taken = {id(ref()) for refs in _lent.values() for ref in refs}
    shared = [name for name, tensor in tensors.items() if id(tensor) in taken]
    if shared:
        names = ", ".join(shared[:3]) + ", ..." * (len(shared) > 3)
        raise StateError(
            f"{len(shared)} of {len(tensors)} tensors to adapt ({names}) are changed by the StreamAdapter of another "
            "model already, which shares them: detach() that one first, or copy the model"
        )


def give_back(
    model: nn.Module,
    source: Snapshot | None,
    flags: Mapping[nn.Module, bool],
    parameters: list[nn.Parameter],
    settle: Callable[[], None],
) -> None:
    """Undo what an adapter does to a model: weights (if `source` is given), gradients and train flags.

    `settle` lets the caller's stream wait for updates that run beside it.
    """
    settle()
    if source is not None:
        source.restore()
    for parameter in parameters:
        parameter.grad = None
    for module, training in flags.items():
        module.training = training
    torch.clear_autocast_cache()
    _lent.pop(model, None)


def check_arguments(
    model: nn.Module, branch: Objective | None, config: StreamConfig, attach: Mapping[str, Any]
) -> None:
    """Raise what `StreamAdapter` documents, before anything changes."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if branch is not None and not isinstance(branch, Objective):
        raise ConfigError(
            f"branch is a {type(branch).__name__}; expected an MAEBranch or another Objective. To name the encoder, "
            "write StreamAdapter(model, encoder=...)"
        )
    if not isinstance(config, StreamConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected a StreamConfig")
    if branch is None and "encoder" not in attach:
        raise ConfigError("pass a branch from MAEBranch.attach(model, ...), or encoder=... to attach one here")
    unknown = set(attach) - set(inspect.signature(MAEBranch.attach).parameters)
    if unknown:
        raise ConfigError(f"{', '.join(map(repr, sorted(unknown)))}: unknown; expected keywords of MAEBranch.attach")
    if branch is not None and attach:
        raise ConfigError(f"{', '.join(attach)} belong to MAEBranch.attach and a branch was given: pass only one")
    if branch is not None and branch.model is not model:
        raise ConfigError("the branch is attached to another model: attach one to this model")
    if model in _lent:
        raise StateError("this model already has a StreamAdapter: detach() that one first, or copy the model")


def adapted_tensors(
    encoder: Mapping[str, nn.Parameter], own: Mapping[str, nn.Parameter], norms: list[nn.Module]
) -> dict[str, Tensor]:
    """Everything that adaptation changes, by name: the weights, and the running statistics where they move."""
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in encoder.items()}
    tensors |= {f"branch.{name}": p for name, p in own.items()}
    for i, norm in enumerate(norms):
        tensors |= {f"norm.{i}.{name}": buffer for name, buffer in norm.named_buffers()}
    return tensors


def memory_of(objective: Objective) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """What an objective remembers beside weights, by name, and what it wants to be called after a gradient step."""
    if not isinstance(objective, StatefulObjective):
        return {}, lambda: None
    return {f"memory.{name}": tensor for name, tensor in objective.memory().items()}, objective.after_step
