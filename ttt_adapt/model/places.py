"""Which pixel of its images a model's first convolution sees where: models may pad images before it.

This is tried out, once for each size of the images: pixels are changed, and what moves in front of the convolution is
looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.hooks import inputs_of, run_encoder, without_checkpointing
from ttt_adapt.model.pass_state import undone_if_it_fails
from ttt_adapt.model.probe import along, evaluating, probe_images
from ttt_adapt.model.threads import in_this_thread

KEPT = 16
"""For how many sizes of the images the places are kept."""
NEAR, SMALL = 16, 0.02
"""A picture may mix pixels up to the first apart; from farther ones the second share of their change may come."""


def find_places(see: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
    """Which pixel of an image each pixel of a picture that is made of it shows.

    The rows of images are numbered in binary digits, and so are the columns. The pixels whose number has a certain
    digit are set to 1, all others to 0; what moves in the picture has this digit. Values may change on the way.

    Args:
        see: makes the picture [1, C', H', W'] of an image [1, C, H, W].
        images: [1, C, H, W], for size, type and device alone.

    Returns:
        int64 [H', W'], the numbers of pixels, row by row from 0, and H * W where the picture shows none (padding). None
        if its pixels are mixed from several ones, as those of a resized image are.
    """
    h, w = images.shape[-2:]
    plain = see(torch.zeros_like(images))
    if plain.ndim != 4 or len(plain) != 1:
        return None

    def moved(pixels: Tensor) -> Tensor:
        """Where the picture moves, bool [H', W'], if these pixels, bool [H, W], are 1."""
        return (see(pixels.to(images).expand_as(images).contiguous()) != plain).any(1)[0]

    def numbers(of_pixels: Tensor, last: int) -> Tensor:
        digits = range(last.bit_length())
        return sum((moved(of_pixels >> d & 1 == 1).long() << d for d in digits), torch.zeros_like(plain[0, 0]).long())

    rows = numbers(torch.arange(1, h + 1, device=images.device)[:, None].expand(h, w), h)  # 0: no pixel
    columns = numbers(torch.arange(1, w + 1, device=images.device).expand(h, w), w)
    shown = rows > 0
    if not torch.equal(shown, columns > 0) or (rows > h).any() or (columns > w).any():
        return None
    places = torch.where(shown, (rows - 1) * w + columns - 1, h * w)
    pattern = torch.rand(h * w, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(images.device) < 0.5
    expected = torch.cat([pattern, pattern.new_zeros(1)])[places]
    return places if torch.equal(moved(pattern.view(h, w)), expected) else None


def shows_all_in_place(places: Tensor, size: tuple[int, int]) -> bool:
    """Whether a picture of these places shows an image of `size` (H, W) as it is."""
    return places.shape == size and torch.equal(places.flatten(), torch.arange(places.numel(), device=places.device))


def moved_to(places: Tensor, values: Tensor) -> Tensor:
    """Values of pixels [B, 1, H, W] -> [B, 1, H', W'], in the places from `find_places`; 0 in the padding."""
    flat = torch.cat([values.flatten(2), values.new_zeros(len(values), 1, 1)], 2)  # [B, 1, H * W + 1]
    return flat.index_select(2, places.flatten()).unflatten(2, places.shape)


@dataclass(frozen=True)
class StemView:
    """What the stem sees of images of one size.

    Attributes:
        places: int64 [H', W'] for each call of the stem in a pass, from `find_places`; None where it sees the image
            itself.
        corner: (top, left), where the image lies in what the features cover.
        size: (H, W) of what the features cover: the image, with the padding of the model around it.
    """

    places: tuple[Tensor | None, ...]
    corner: tuple[int, int]
    size: tuple[int, int]


class StemViews:
    """Looks at images through a model's stem.

    Args:
        model: the user's model.
        encoder: the module where the encoder ends.
        stem: the model's first convolution.
        checkpointing: modules that can recompute their activations in the backward pass.
        size: (H, W) of images that the model takes.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: nn.Module,
        stem: nn.Conv2d,
        checkpointing: list[nn.Module],
        size: tuple[int, int],
    ) -> None:
        self._model, self._stem, self._checkpointing = model, stem, checkpointing
        self._known: OrderedDict[tuple[object, ...], StemView] = OrderedDict()
        calls: list[nn.Module] = []
        handle = stem.register_forward_pre_hook(in_this_thread(lambda module, _args: calls.append(module)))
        try:
            with evaluating(model), without_checkpointing(checkpointing), torch.no_grad():
                run_encoder(model, encoder, self._images(size))
        finally:
            handle.remove()
        self._calls = len(calls)

    @torch.inference_mode(False)  # what is kept takes part in gradients later
    def at(self, size: tuple[int, int]) -> StemView:
        """What the stem sees of images of `size` (H, W); tried out at the first call with this size.

        Raises:
            EncoderError: it sees their pixels resized, cropped, mixed or in another order.
        """
        key = (size, self._stem.weight.device)
        if key not in self._known:
            with evaluating(self._model), without_checkpointing(self._checkpointing), torch.no_grad():
                self._known[key] = self._look(size)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def takes(self, size: tuple[int, int]) -> bool:
        """Whether the model runs on images of `size` (H, W), and its stem sees them as they are or padded."""
        try:
            with undone_if_it_fails(self._model):
                self.at(size)
        except Exception:  # a model of one size
            return False
        return True

    def _look(self, size: tuple[int, int]) -> StemView:
        images = self._images(size)
        places = tuple(self._places(images, call, seen) for call, seen in enumerate(self._seen(images)))
        if places[0] is None:
            return StemView(places, (0, 0), size)
        corner = _corner(places[0], size)
        if corner is None:
            raise _refused(size, tuple(places[0].shape))
        axes = [self._covered(axis, corner[axis], size[axis], places[0].shape[axis]) for axis in (0, 1)]
        return StemView(places, (axes[0][0], axes[1][0]), (axes[0][1], axes[1][1]))

    def _images(self, size: tuple[int, int]) -> Tensor:
        """Random images [1, C, H, W] of `size` (H, W), with as many channels as the stem takes."""
        return probe_images(self._model, size)[:, :1].repeat(1, self._stem.in_channels, 1, 1)

    def _seen(self, images: Tensor) -> list[Tensor]:
        """What the stem is called with, for each call."""
        return inputs_of(self._model, self._stem, images, self._calls)

    def _places(self, images: Tensor, call: int, seen: Tensor) -> Tensor | None:
        if seen.shape == images.shape and torch.equal(seen, images):
            return None
        found = find_places(lambda x: self._seen(x)[call], images)
        h, w = images.shape[-2:]
        if found is not None:
            return None if shows_all_in_place(found, (h, w)) else found
        if seen.shape[-2:] == (h, w) and _stay_near(lambda x: self._seen(x)[call], images, seen):
            return None  # every pixel depends on all, as where a model normalises each image by itself
        raise _refused((h, w), tuple(seen.shape[-2:]))

    def _covered(self, axis: int, before: int, side: int, seen: int) -> tuple[int, int]:
        """Where the image begins along one axis in what the features cover, and how long that is.

        A model may pad for a convolution that does not pad by itself, and has no more cells for it.
        """
        kernel, stride = along(self._stem.kernel_size, axis), along(self._stem.stride, axis)
        after = seen - side - before
        reach = along(self._stem.dilation, axis) * (kernel - 1)
        plain = isinstance(self._stem.padding, tuple) and along(self._stem.padding, axis) == 0
        if plain and kernel > stride and max(before, after) <= (reach + 1) // 2:
            return 0, side
        return before, seen


def _stay_near(see: Callable[[Tensor], Tensor], images: Tensor, plain: Tensor) -> bool:
    """Whether pixels that change places in a square move the picture there, and not far from there.

    Sums over the image, its extremes and its order of values stay as they are, so normalising moves nothing far away.

    Args:
        see: makes the picture [1, C', H, W] of an image [1, C, H, W].
        images: random images [1, C, H, W].
        plain: the picture of these.
    """
    h, w = images.shape[-2:]
    rows, columns = slice(h // 8, h // 4), slice(w // 8, w // 4)  # its mirror images lie elsewhere
    other = images.clone()
    other[..., rows, columns] = images[..., rows, columns].roll((1, 1), (2, 3))
    moved = (see(other) - plain).abs().float().amax((0, 1))  # [H, W]
    far = torch.ones_like(moved, dtype=torch.bool)
    far[: h // 4 + NEAR, : w // 4 + NEAR] = False
    inside = moved[rows, columns]
    return not (inside.numel() and far.any()) or bool(moved[far].max() <= SMALL * inside.max())


def _refused(size: tuple[int, int], seen: tuple[int, ...]) -> EncoderError:
    return EncoderError(
        f"the stem sees {seen} of an image of {size} (H, W), and not the whole image with padding around it: a model "
        "that resizes its images inside, crops them, turns them around or averages them with turned ones cannot be "
        "masked by pixels; let it take images as the stem sees them"
    )


def _corner(places: Tensor, size: tuple[int, int]) -> tuple[int, int] | None:
    """Where the whole image lies in a picture of these places, (top, left); None if it does not."""
    h, w = size
    image = torch.arange(h * w, device=places.device).view(h, w)
    for top, left in (places == 0).nonzero().tolist():
        if torch.equal(places[top : top + h, left : left + w], image):
            return top, left
    return None
