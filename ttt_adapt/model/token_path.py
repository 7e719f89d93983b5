"""Find the blocks of a plain transformer, and try out whether they may see a part of the tokens only."""

from __future__ import annotations

import torch
from torch import nn

from ttt_adapt.model.features import MAX_PREFIX, tensors
from ttt_adapt.model.hooks import TokenPath, run_encoder, visible_tokens
from ttt_adapt.model.probe import probe_images
from ttt_adapt.model.trace import Trace


def find_token_path(
    model: nn.Module, encoder: nn.Module, trace: Trace, size: tuple[int, int], stride: int | None
) -> TokenPath | None:
    """The transformer's blocks, if hidden tokens may be left out in them; None for every other encoder.

    This is tried out, not guessed from the name of a class.

    Args:
        model: the user's model.
        encoder: the module where the encoder ends.
        trace: of a pass over probe images of `size`.
        size: (H, W).
        stride: of the first convolution, the side of a token in pixels; None without one.
    """
    if stride is None:
        return None
    patches = (size[0] // stride) * (size[1] // stride)
    for group in sorted(trace.lists, key=len, reverse=True):
        blocks = [child for child in group if child in trace.inputs]
        shapes = {trace.inputs[block] for block in blocks}
        if len(shapes) != 1 or len({type(block) for block in blocks}) != 1:
            continue
        shape = shapes.pop()  # [B, prefix + patches, C] if these are the blocks
        if len(shape) != 3 or not 0 <= shape[1] - patches <= MAX_PREFIX:
            continue
        for every_block in (False, True):
            path = TokenPath(tuple(blocks), stride, shape[1] - patches, shape[2], every_block)
            if _tokens_are_a_set(model, encoder, path, size, patches):
                return path
    return None


def _tokens_are_a_set(
    model: nn.Module, encoder: nn.Module, path: TokenPath, size: tuple[int, int], patches: int
) -> bool:
    """Whether the blocks treat their tokens as a set: their order changes no output, and a part of them runs.

    Attention in windows and tables of relative positions need all tokens in their places; they fail here.
    """
    images = probe_images(model, size)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(patches, generator=generator).to(images.device)[None]  # [1, patches]
    fill = torch.zeros(path.width, device=images.device)
    try:
        with torch.no_grad():
            plain = list(tensors(run_encoder(model, encoder, images)))
            with visible_tokens(path, order, patches, fill):
                permuted = list(tensors(run_encoder(model, encoder, images)))
            with visible_tokens(path, order[:, : max(patches // 2, 1)], patches, fill):
                half = list(tensors(run_encoder(model, encoder, images)))
    except Exception:  # these blocks cannot run without all tokens in order
        return False
    if not [t.shape for t in plain] == [t.shape for t in permuted] == [t.shape for t in half]:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item()) for a, b in zip(plain, permuted, strict=True)
    )
