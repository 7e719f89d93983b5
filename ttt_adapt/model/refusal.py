"""Why a model does not run on images, and what its owner can do about it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.probe import probe_images

WRAP = "wrap the model in a module whose forward takes"


def why_not(model: nn.Module, size: tuple[int, int]) -> str:
    """What to do with a model that does not take images [1, 3, H, W] of `size`, and the reason where it can be told."""
    if names := _other_inputs(model):
        return (
            f"The model is called as model(images), and its forward also needs {', '.join(names)}: {WRAP} the images "
            "alone and adds the rest"
        )
    first = _first_convolution(model, size)
    if isinstance(first, nn.Conv3d):
        return (
            "Its first convolution is a Conv3d: it takes clips of video [B, C, T, H, W], and frames come one by one: "
            f"{WRAP} images [B, 3, H, W], or take a model of images"
        )
    if isinstance(first, nn.Conv2d) and first.in_channels != 3:
        channels = first.in_channels
        example = ", such as x.mean(1, keepdim=True); a grey frame has three equal channels then"
        if channels > 3:
            example = f", such as F.pad(x, (0, 0, 0, 0, 0, {channels - 3})); nothing but RGB comes with a frame"
        return (
            f"Its first convolution takes {channels} channel(s), and frames have three (RGB): {WRAP} images "
            f"[B, 3, H, W] and makes {channels} channel(s) of them{example if channels != 2 else ''}"
        )
    return "Pass image_size=(H, W) with a size that it takes"


def _other_inputs(model: nn.Module) -> list[str]:
    """Names of what the model's forward needs beside its first argument."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that says nothing of its arguments
        return []
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters[1:] if p.default is inspect.Parameter.empty and p.kind not in given]


def _first_convolution(model: nn.Module, size: tuple[int, int]) -> nn.Module | None:
    """The first convolution that a pass calls, as far as it gets; if it gets to none, the first of the model."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    called: list[nn.Module] = []

    def see(module: nn.Module, _args: Any) -> None:
        called.append(module)

    try:
        with torch.no_grad(), hooks(m.register_forward_pre_hook(see) for m in convolutions):
            model(probe_images(model, size))
    except Exception:  # this is what the caller asks about
        return (called or convolutions or [None])[0]
    return None
