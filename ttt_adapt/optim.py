"""The optimizer of a stream: parameter groups and the default, AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig

ParamGroups = list[dict[str, Any]]


def parameter_groups(
    encoder: Mapping[str, nn.Parameter],
    own: Mapping[str, nn.Parameter],
    modules: Iterable[nn.Module],
    config: StreamConfig,
) -> ParamGroups:
    """Encoder and decoder, each with and without weight decay.

    Args:
        encoder: name -> parameter of the model that is adapted, at `lr * encoder_lr_scale`.
        own: name -> parameter of the branch, at `lr`.
        modules: where the parameters live, the user's model and the branch: embedding tables are not decayed.
        config: learning rates and weight decay.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`; empty ones are left out.
    """
    tables = embedding_tables(*modules)
    groups = []
    for part, named, lr in (("encoder", encoder, config.lr * config.encoder_lr_scale), ("decoder", own, config.lr)):
        bare = {n for n, p in named.items() if not decays(n, p) or id(p) in tables}
        for name, members, decay in (
            (part, [p for n, p in named.items() if n not in bare], config.weight_decay),
            (f"{part}_no_decay", [p for n, p in named.items() if n in bare], 0.0),
        ):
            if members:
                groups.append({"name": name, "params": members, "lr": lr, "weight_decay": decay})
    return groups


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms, biases, tokens, position embeddings and relative position tables."""
    words = ("token", "pos_embed", "position")
    return parameter.ndim > 1 and not any(word in name.rpartition(".")[2] for word in words)


def embedding_tables(*modules: nn.Module) -> set[int]:
    """The ids of the parameters of `nn.Embedding` layers, which are not decayed either."""
    layers = (layer for module in modules for layer in module.modules())
    return {id(p) for layer in layers if isinstance(layer, nn.Embedding) for p in layer.parameters()}


def adamw(groups: ParamGroups) -> torch.optim.Optimizer:
    """AdamW in its fused form; the groups carry learning rates and weight decay."""
    return torch.optim.AdamW(groups, fused=True)
