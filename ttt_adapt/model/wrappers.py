"""Wrappers around a model: compiled, for several devices, or of a training library."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttt_adapt.errors import ConfigError


def check_module(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`; any other model itself."""
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model._modules.get("_orig_mod") or (model.module if isinstance(model, kinds) else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_part(inner: nn.Module, model: nn.Module) -> bool:
    """Whether a module is the model, or is inside of it."""
    return any(module is inner for module in model.modules())


def outermost(model: nn.Module, attached: nn.Module) -> nn.Module | None:
    """Of a model and the model that an objective is attached to, the one that holds the other; None: neither does.

    Args:
        model: what the user passes; any module around the other, such as one of Lightning.
        attached: the objective's model. It holds `model` only where it is a plain wrapper, see `unwrapped`.
    """
    if is_part(attached, model):
        return model
    return attached if unwrapped(attached) is unwrapped(model) else None
