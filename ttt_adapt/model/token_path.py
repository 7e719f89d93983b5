"""Find the blocks of a plain transformer, and try out whether they may see a part of the tokens only.

Nothing is guessed from the name of a class. An encoder passes if

1. every token answers to its own patch: changing the pixels of a patch moves its token in front of the blocks, and no
   other token,
2. the order of the tokens changes no output, and the blocks run with a part of them,
3. changing the pixels of all hidden patches changes no output at all,
4. larger images have as many tokens as they have patches.

Each trial runs with the weights near zero replaced by larger ones. Residual branches that are scaled by 1e-5, tables of
relative positions and gates that start at zero do nothing before training, and must not pass for that reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.model.features import MAX_PREFIX, tensors
from ttt_adapt.model.hooks import TokenPath, inputs_of, run_encoder, visible_tokens
from ttt_adapt.model.other_weights import with_other_weights
from ttt_adapt.model.probe import probe_images
from ttt_adapt.model.trace import Trace

NO_BLOCKS = "it has no list of equal blocks that take tokens [B, N, C], one for each patch of the image"
NO_SET = "its blocks do not take their tokens as a set: they need all of them, in their order"
OTHER_PIXELS = (
    "its tokens do not each answer to the pixels of their own patch, row by row behind class and register tokens "
    "(overlapping patches, padding, another order, or tokens made of the whole image): hidden pixels would reach "
    "visible tokens"
)
PADS = "it pads or resizes its images inside, so their size does not tell how many tokens they have"
HIDDEN_CHANGES = ((-3.0, 1.0), (0.0, 10.0), (0.0, -10.0), (100.0, 0.0))
"""What hidden pixels become in the trials, a factor and an offset: a model may look at large or bright images alone."""
LEAK = "hidden pixels reach its features on another way than through its blocks"


def find_token_path(
    model: nn.Module, encoder: nn.Module, trace: Trace, size: tuple[int, int], stride: int | None
) -> tuple[TokenPath | None, str]:
    """The transformer's blocks, if hidden tokens may be left out in them.

    Args:
        model: the user's model.
        encoder: the module where the encoder ends.
        trace: of a pass over probe images of `size`.
        size: (H, W).
        stride: of the first convolution, the side of a token in pixels; None without one.

    Returns:
        The blocks and "", or None and the reason why no token may be left out.
    """
    reason = NO_BLOCKS
    if stride is None:
        return None, reason
    grid = (size[0] // stride, size[1] // stride)
    patches = grid[0] * grid[1]
    for group in sorted(trace.lists, key=len, reverse=True):
        blocks = list(dict.fromkeys(child for child in group if child in trace.inputs))  # a list may hold one twice
        shapes = {trace.inputs[block] for block in blocks}
        if len(shapes) != 1 or len({type(block) for block in blocks}) != 1:
            continue
        shape = shapes.pop()  # [B, prefix + patches, C] if these are the blocks
        if len(shape) != 3 or not 0 <= shape[1] - patches <= MAX_PREFIX:
            continue
        once = TokenPath(tuple(blocks), stride, shape[1] - patches, shape[2])
        for path in (once, replace(once, every_block=True)):
            reason = _Trial(model, encoder, path, probe_images(model, size), grid).reason()
            if not reason:
                return path, ""
    return None, reason


class _Trial:
    """The trials of one path, on images of one size.

    Args:
        model: the user's model.
        encoder: the module where the encoder ends.
        path: the blocks.
        images: random images [1, 3, H, W].
        grid: rows and columns of patches in them.
    """

    def __init__(
        self, model: nn.Module, encoder: nn.Module, path: TokenPath, images: Tensor, grid: tuple[int, int]
    ) -> None:
        self._model, self._call, self._encoder, self._path = model, _with_larger_weights(model), encoder, path
        self._images, self._grid, self._patches = images, grid, grid[0] * grid[1]
        self._generator = torch.Generator("cpu").manual_seed(1)
        self._fill = torch.zeros(path.width, device=images.device)

    @torch.no_grad()
    def reason(self) -> str:
        """Why tokens may not be left out on this path; "" if they may."""
        try:
            if not self._tokens_answer_to_their_patches():
                return OTHER_PIXELS
            if not self._tokens_are_a_set():
                return NO_SET
            if not self._hidden_pixels_stay_hidden():
                return LEAK
            return "" if self._tokens_follow_the_size() else PADS
        except Exception:  # these blocks cannot run without all tokens in order
            return NO_SET

    def _tokens_answer_to_their_patches(self) -> bool:
        """Whether each patch moves its own token in front of the blocks, and no other.

        Half of the patches are changed at a time: those whose number has, or has not, a certain binary digit. For any
        two patches some trial changes the one and not the other, so no pair of a patch and a foreign token is missed.
        """
        plain = self._first_tokens(self._images)
        numbers = torch.arange(self._patches, device="cpu")
        for digit in range((self._patches - 1).bit_length()):
            for value in (0, 1):
                chosen = (numbers >> digit & 1 == value).to(plain.device)
                moved = _moved(plain, self._first_tokens(self._changed(chosen)))[0]  # [prefix + patches]
                if moved[: self._path.prefix].any() or not torch.equal(moved[self._path.prefix :], chosen):
                    return False
        return True

    def _tokens_are_a_set(self) -> bool:
        """Whether the blocks treat their tokens as a set: their order changes no output, and a part of them runs.

        Attention in windows and tables of relative positions need all tokens in their places; they fail here.
        """
        order = torch.randperm(self._patches, generator=self._generator, device="cpu").to(
            self._images.device
        )  # [patches]
        plain = list(tensors(run_encoder(self._call, self._encoder, self._images)))
        permuted, half = self._outputs(self._images, order), self._outputs(self._images, order[: self._half])
        if not [t.shape for t in plain] == [t.shape for t in permuted] == [t.shape for t in half]:
            return False
        return all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
            for a, b in zip(plain, permuted, strict=True)
        )

    def _hidden_pixels_stay_hidden(self) -> bool:
        """Whether the pixels of hidden patches move nothing that the encoder returns.

        One half of the patches, drawn at random, is hidden, then the other half: a way from a hidden patch to a
        visible one that exists for patches everywhere is seen in one of the two.
        """
        order = torch.randperm(self._patches, generator=self._generator, device="cpu").to(self._images.device)
        for visible, hidden in ((order[: self._half], order[self._half :]), (order[self._half :], order[: self._half])):
            chosen = torch.zeros(self._patches, dtype=torch.bool, device=order.device).scatter_(0, hidden, True)
            plain = self._outputs(self._images, visible)
            for factor, offset in HIDDEN_CHANGES:
                other = self._outputs(self._changed(chosen, factor, offset), visible)
                if any(_moved(a, b).any() for a, b in zip(plain, other, strict=True)):
                    return False
        return True

    def _tokens_follow_the_size(self) -> bool:
        """Whether an image with one more row and column of patches has as many tokens more, if the model takes it."""
        rows, columns = self._grid[0] + 1, self._grid[1] + 1
        side = self._path.patch_size
        try:
            tokens = self._first_tokens(probe_images(self._model, (rows * side, columns * side)))
        except Exception:  # a model of one size
            return True
        return tokens.shape[1] == self._path.prefix + rows * columns

    @property
    def _half(self) -> int:
        return max(self._patches // 2, 1)

    def _first_tokens(self, images: Tensor) -> Tensor:
        """The tokens [1, prefix + patches, C] that the first block is called with."""
        return inputs_of(self._call, self._path.blocks[0], images)[0]

    def _outputs(self, images: Tensor, order: Tensor) -> list[Tensor]:
        """All tensors that the encoder returns if its blocks see the patches `order` [n] only."""
        with visible_tokens(self._path, order[None], self._patches, self._fill):
            return list(tensors(run_encoder(self._call, self._encoder, images)))

    def _changed(self, chosen: Tensor, factor: float = -3.0, offset: float = 1.0) -> Tensor:
        """The images with other pixels, `factor` times moved ones plus `offset`, in the chosen patches, [patches]."""
        side = self._path.patch_size
        pixels = chosen.view(self._grid).repeat_interleave(side, 0).repeat_interleave(side, 1)  # [H, W]
        return torch.where(pixels, self._images.roll((side // 2 + 1, 1), (2, 3)) * factor + offset, self._images)


def _moved(a: Tensor, b: Tensor) -> Tensor:
    """Which rows of `b` [..., C] differ from those of `a`, [...].

    A difference up to 2e-6 of the largest value is none. Passes over tensors of the same shape agree bit for bit,
    except where a library adds in another order from call to call; in single precision this is below the bound. The
    pixels that are changed here change by more than their own size, and the weights that carry them are not near zero.
    """
    difference = (a - b).abs().float()
    return difference.amax(-1) > 2e-6 * a.abs().max().float() if a.ndim else difference > 0


NEAR_ZERO, LARGER = 1e-2, 0.1
"""Parameters whose values are all below the first become random numbers of the size of the second, in the trials."""


def _with_larger_weights(model: nn.Module) -> Callable[[Tensor], Any]:
    """`model` as a function of images, with random numbers in the place of parameters near zero.

    The model itself stays as it is."""
    larger = {}
    for name, p in model.named_parameters():
        if p.numel() and p.is_floating_point() and p.abs().max() < NEAR_ZERO:
            generator = torch.Generator("cpu").manual_seed(len(name))
            larger[name] = LARGER * torch.randn(p.shape, generator=generator, device="cpu").to(p)

    def call(images: Tensor) -> Any:
        with with_other_weights(model, larger):
            return model(images)

    return call
