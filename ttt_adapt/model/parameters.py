"""Which parameters weight decay applies to, and whether saved weights belong to a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ttt_adapt.errors import CheckpointError


def split_by_decay(
    named: Iterable[tuple[str, nn.Parameter]], modules: Iterable[nn.Module]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those with weight decay and those without, each list in the order of `named`.

    Args:
        named: names and parameters.
        modules: the modules that the parameters belong to. Their embedding tables get no weight decay.
    """
    tables = embedding_tables(*modules)
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for name, parameter in named:
        (with_decay if decays(name, parameter) and id(parameter) not in tables else without).append(parameter)
    return with_decay, without


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies, by name and shape.

    It does not for norms and biases (one axis), tokens, position embeddings and tables of relative positions.
    """
    words = ("token", "pos_embed", "position")
    return parameter.ndim > 1 and not any(word in name.rpartition(".")[2] for word in words)


def embedding_tables(*modules: nn.Module) -> set[int]:
    """The ids of the parameters of all `nn.Embedding` layers in these modules."""
    layers = (layer for module in modules for layer in module.modules())
    return {id(p) for layer in layers if isinstance(layer, nn.Embedding) for p in layer.parameters()}


def check_state(own: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """Check that a saved state has the names and shapes of `own`.

    Args:
        own: name -> tensor, of the module that the state is for.
        other: name -> tensor, the saved state.
        what: the module in words, for the message.

    Raises:
        CheckpointError: names or shapes differ; the message lists them.
    """
    missing = [key for key in own if key not in other]
    unknown = [key for key in other if key not in own]
    shapes = [
        f"{key}: {tuple(other[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in other and isinstance(own[key], Tensor) and own[key].shape != other[key].shape
    ]
    problems = [
        f"{title} ({len(names)}): {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for title, names in (("missing", missing), ("unknown", unknown), ("other shapes", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights do not belong to {what}: " + "; ".join(problems))
