"""Why a model does not run on images, and what its owner can do about it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.probe import probe_images

WRAP = "wrap the model in a module whose forward takes"
FRAMES = 8
"""Length of the clips that are tried."""


def why_not(model: nn.Module, sizes: list[tuple[int, int]]) -> str:
    """Why a model does not take images [1, 3, H, W], and what to do; "" where it cannot be told.

    Args:
        model: in evaluation mode.
        sizes: (H, W) of the images that were tried.
    """
    if names := _other_inputs(model):
        return (
            f"the model is called as model(images), and its forward also needs {', '.join(names)}: {WRAP} the images "
            "alone and adds the rest"
        )
    first = _first_layer(model, sizes[0])
    if isinstance(first, nn.Conv3d):
        return _takes_clips("Its first convolution is a Conv3d", "[B, C, T, H, W]")
    if clips := _clips_that_run(model, sizes):
        return _takes_clips(f"It runs on random clips of {FRAMES} frames and on no images", clips)
    if isinstance(first, nn.Conv2d) and first.in_channels != 3:
        channels = first.in_channels
        example = ", such as x.mean(1, keepdim=True); a grey frame has three equal channels then"
        if channels > 3:
            example = f", such as F.pad(x, (0, 0, 0, 0, 0, {channels - 3})); nothing but RGB comes with a frame"
        return (
            f"its first convolution takes {channels} channel(s), and frames have three (RGB): {WRAP} images "
            f"[B, 3, H, W] and makes {channels} channel(s) of them{example if channels != 2 else ''}"
        )
    if isinstance(first, nn.Linear) and (side := round((first.in_features / 3) ** 0.5)) ** 2 * 3 == first.in_features:
        return (
            f"its first layer is a Linear over {first.in_features} numbers, so it takes images that are cut into "
            f"patches of {side} x {side} already, [B, N, {first.in_features}]: {WRAP} images [B, 3, H, W] and cuts them"
        )
    return ""


def _takes_clips(seen: str, layout: str) -> str:
    return (
        f"the model takes clips of video {layout}, not images [B, C, H, W]. {seen}. Frames come one by one here: "
        f"{WRAP} images [B, 3, H, W], or take a model of images"
    )


def _clips_that_run(model: nn.Module, sizes: list[tuple[int, int]]) -> str:
    """The layout of the random clips that a model runs on; "" where it runs on none."""
    for size in sizes:
        frames = probe_images(model, size)[0].expand(FRAMES, -1, -1, -1)  # [T, 3, H, W]
        for layout, clip in (("[B, T, C, H, W]", frames), ("[B, C, T, H, W]", frames.transpose(0, 1))):
            try:
                with torch.no_grad():
                    model(clip[None].contiguous())
            except Exception:  # neither clips of this size
                continue
            return layout
    return ""


def _other_inputs(model: nn.Module) -> list[str]:
    """Names of what the model's forward needs beside its first argument."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that says nothing of its arguments
        return []
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters[1:] if p.default is inspect.Parameter.empty and p.kind not in given]


def _first_layer(model: nn.Module, size: tuple[int, int]) -> nn.Module | None:
    """The first convolution or linear layer that a pass calls, as far as it gets; else the first convolution."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    called: list[nn.Module] = []

    def see(module: nn.Module, _args: Any) -> None:
        called.append(module)

    try:
        with torch.no_grad(), hooks(m.register_forward_pre_hook(see) for m in (*convolutions, *linear)):
            model(probe_images(model, size))
    except Exception:  # this is what the caller asks about
        return (called or convolutions or [None])[0]
    return None
