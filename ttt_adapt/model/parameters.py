"""Which parameters weight decay applies to, and whether saved weights belong to a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import CheckpointError
from ttt_adapt.schema import shown


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


def check_state(own: Mapping[str, Any], other: Any, what: str, finite: bool = False) -> None:
    """Check that a saved state has the names, shapes and kinds of numbers of `own`.

    Args:
        own: name -> tensor, of the module that the state is for.
        other: name -> tensor, the saved state.
        what: the module in words, for the message.
        finite: refuse infinite numbers, too, where those of `own` are finite.

    Raises:
        CheckpointError: names, shapes or kinds differ, or there are NaN; the message lists them.
    """
    if not isinstance(other, Mapping):
        raise CheckpointError(f"the weights do not belong to {what}: {shown(other)}, expected tensors by name")
    both = [key for key in own if key in other]
    shapes = [
        f"{key}: {tuple(other[key].shape)}, expected {tuple(own[key].shape)}"
        for key in both
        if isinstance(own[key], Tensor) and _is_dense(other[key]) and own[key].shape != other[key].shape
    ]
    kinds = [
        f"{key}: {shown(other[key])}, expected {shown(own[key])}"
        for key in both
        if not _same_kind(own[key], other[key])
    ]
    titles = {
        "missing": [key for key in own if key not in other],
        "unknown": [shown(key).strip("'") for key in other if key not in own],
        "other shapes": shapes,
        "of another kind": kinds,
    }
    if not any(titles.values()):
        titles["not finite"] = [key for key in both if not _is_sound(own[key], other[key], finite)]
    problems = [
        f"{title} ({len(names)}): {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for title, names in titles.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights do not belong to {what}: " + "; ".join(problems))


def dense(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one: not sparse, not quantized, not nested, and with values."""
    kind = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
    return kind and not tensor.is_complex()


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and dense(value)


def _same_kind(own: Any, other: Any) -> bool:
    """Whether one tensor can be copied into another without a change of meaning; what is no tensor is not looked at."""
    if not isinstance(own, Tensor):
        return True
    if not _is_dense(other):
        return False
    if own.is_floating_point() and own.element_size() > 1:
        return other.is_floating_point() and other.element_size() > 1
    return own.dtype == other.dtype


def _is_sound(own: Any, other: Any, finite: bool) -> bool:
    """Whether a saved tensor has no NaN, and with `finite` no infinite number where `own` has none."""
    if not isinstance(own, Tensor) or not own.is_floating_point():
        return True
    if not finite:
        return not bool(other.isnan().any())
    return bool(other.isfinite().all()) or bool((other.isfinite() | ~own.isfinite().to(other.device)).all())
