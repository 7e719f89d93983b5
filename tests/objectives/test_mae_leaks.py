"""Hidden pixels never reach the features, whatever the encoder does with its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError, FrameError
from ttt_adapt.objectives.masking import upsample_mask

SIZE, GRID, WIDTH = (32, 48), (4, 6), 16
PATCHES = GRID[0] * GRID[1]


class Vit(nn.Module):
    """A plain transformer over patches of 8 x 8. Subclasses change one thing each."""

    stem: nn.Module

    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8) if stem is None else stem
        self.position = nn.Parameter(torch.randn(1, PATCHES, WIDTH))
        self.extra = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def embed(self, images: Tensor) -> Tensor:
        return self.stem(images).flatten(2).transpose(1, 2) + self.position

    def arrange(self, patches: Tensor) -> Tensor:
        return torch.cat([self.extra.expand(len(patches), -1, -1), patches], 1)

    def encode(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.encode(self.arrange(self.embed(images)))).mean(1))


class Behind(Vit):
    def arrange(self, patches):
        return super().arrange(patches).roll(-2, 1)


class Middle(Vit):
    def arrange(self, patches):
        tokens = super().arrange(patches)
        return torch.cat([patches[:, : PATCHES // 2], tokens[:, :2], patches[:, PATCHES // 2 :]], 1)


class Columns(Vit):
    def arrange(self, patches):
        return patches.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)


class Mirrored(Vit):
    def arrange(self, patches):
        return patches.flip(1)


class Snake(Vit):
    def arrange(self, patches):
        rows = patches.unflatten(1, GRID)
        return torch.stack([row.flip(1) if i % 2 else row for i, row in enumerate(rows.unbind(1))], 1).flatten(1, 2)


class TwoSwapped(Vit):
    def arrange(self, patches):
        order = list(range(PATCHES))
        order[7], order[8] = order[8], order[7]
        return patches[:, order]


class ClassTokenOfTheImage(Vit):
    def arrange(self, patches):
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


class MeanAdded(Vit):
    def arrange(self, patches):
        return patches + patches.mean(1, keepdim=True)


class PastTheBlocks(Vit):
    def encode(self, tokens):
        return tokens + super().encode(tokens)


class GatedPastTheBlocks(Vit):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def encode(self, tokens):
        return super().encode(tokens) + self.gate * tokens


class Memory(Vit):
    """Its blocks look at all patches beside their own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, batch_first=True) for _ in range(2))

    def encode(self, tokens):
        memory = tokens
        for block in self.blocks:
            tokens = block(tokens, memory)
        return tokens


LEAKY = {
    "registers behind": Behind,
    "registers in the middle": Middle,
    "columns": Columns,
    "snake": Snake,
    "two swapped": TwoSwapped,
    "a class token of the image": ClassTokenOfTheImage,
    "the mean added": MeanAdded,
    "a way past the blocks": PastTheBlocks,
    "a way past the blocks that starts at zero": GatedPastTheBlocks,
    "padding": lambda: Vit(nn.Conv2d(3, WIDTH, 8, 8, 1)),
    "a larger kernel": lambda: Vit(nn.Conv2d(3, WIDTH, 10, 8, 1)),
    "a convolution over the tokens": lambda: Vit(
        nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH))
    ),
    "statistics of the image": lambda: Vit(nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.InstanceNorm2d(WIDTH))),
}


def attach(model: nn.Module, encoder: str = "norm", **options) -> MAEBranch:
    return MAEBranch.attach(model, encoder, patch_size=8, image_size=SIZE, **options)


def moved_by_hidden_pixels(branch: MAEBranch) -> float:
    """How much the reconstruction depends on what the hidden pixels are."""
    images = torch.randn(2, 3, *SIZE)
    mask = branch.draw_mask(images)
    other = torch.where(upsample_mask(mask, branch.patch_size), images, 5 * torch.randn_like(images))
    first, second = (branch.reconstruct(x, mask=mask).prediction for x in (images, other))
    return (first - second).abs().max().item()


@pytest.mark.parametrize("kind", LEAKY)
def test_tokens_through_which_hidden_pixels_would_leak_get_pixel_masking(kind):
    model = LEAKY[kind]().eval()
    with left_as_it_was(model):
        branch = attach(model)
    assert branch.masking == "pixels"
    assert moved_by_hidden_pixels(branch) == 0.0
    with (
        left_as_it_was(model),
        pytest.raises(EncoderError, match='masking="tokens".*(hidden pixels|as a set).*"pixels"'),
    ):
        attach(model, masking="tokens")


def test_tokens_none_of_which_lies_where_its_pixels_are_are_refused_with_the_reason():
    model = Mirrored().eval()
    with left_as_it_was(model), pytest.raises(EncoderError, match="neither row by row nor column by column"):
        attach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", ["blocks", "norm"])
def test_a_plain_transformer_is_masked_by_tokens_and_leaks_nothing(encoder, dtype):
    model = Vit().eval()
    branch = attach(model, encoder)
    assert branch.masking == "tokens"
    assert branch.info.tokens.prefix == 2
    assert moved_by_hidden_pixels(branch) == 0.0


def test_a_memory_of_all_patches_is_masked_with_the_tokens():
    branch = attach(Memory().eval())
    assert branch.masking == "tokens"
    assert moved_by_hidden_pixels(branch) == 0.0


@pytest.mark.parametrize("special", [lambda x: x.mean() > 1, lambda x: x.mean() < -1, lambda x: x.abs().amax() > 50])
def test_a_model_that_treats_bright_dark_or_large_images_apart_gets_pixel_masking(special):
    class Conditional(Vit):
        def forward(self, images):
            return super().forward(images + special(images).float())

    branch = attach(Conditional().eval())
    assert branch.masking == "pixels"
    assert "hidden pixels reach" in branch.info.no_tokens


def test_the_tokens_that_are_kept_are_those_of_the_visible_pixels():
    model = Vit().eval()
    branch, kept = attach(model), []
    images = torch.randn(1, 3, *SIZE)
    mask = branch.draw_mask(images)
    model.blocks[0].self_attn.register_forward_pre_hook(lambda _m, args: kept.append(args[0][0, 2:]))
    branch.reconstruct(images, mask=mask)
    with torch.no_grad():
        every = model.embed(images)[0]
    assert torch.equal(kept[0], every[mask.flatten()])


@pytest.mark.parametrize("calls", ["aaa", "abab", "aabb", "aba"])
@pytest.mark.parametrize("listed", ["once", "for every call"])
def test_blocks_that_are_called_several_times_see_the_visible_tokens_only(calls, listed):
    class Shared(Vit):
        def __init__(self):
            super().__init__()
            self.named = dict(zip("ab", self.blocks, strict=True))
            self.blocks = nn.ModuleList(self.named[name] for name in (calls if listed != "once" else sorted({*calls})))

        def encode(self, tokens):
            for name in calls:
                tokens = self.named[name](tokens)
            return tokens

    model = Shared().eval()
    branch = attach(model)
    assert branch.masking == "tokens"
    assert moved_by_hidden_pixels(branch) == 0.0
    images, features = torch.randn(1, 3, *SIZE), []
    mask = branch.draw_mask(images)
    model.norm.register_forward_hook(lambda _m, _args, output: features.append(output[0, 2:]))
    branch.reconstruct(images, mask=mask)
    with torch.no_grad():
        every = model.arrange(model.embed(images))
        by_hand = model.norm(model.encode(every[:, torch.cat([torch.ones(2, dtype=torch.bool), mask.flatten()])]))
    torch.testing.assert_close(features[0][mask.flatten()], by_hand[0, 2:])


def test_a_size_that_the_model_pads_is_refused_with_the_way_out():
    class PaddingSmallOnes(Vit):
        def embed(self, images):
            return super().embed(nn.functional.pad(images, (0, max(48 - images.shape[3], 0))))

    branch = attach(PaddingSmallOnes().eval())
    assert branch.masking == "tokens"
    with pytest.raises(FrameError, match=r'\(1, 26, 16\).*8 patches; expected 10 tokens.*masking="pixels"'):
        branch.loss(torch.randn(1, 3, 32, 16))


@pytest.mark.parametrize("share", [0, 2])
def test_a_model_that_pads_or_resizes_its_images_gets_pixel_masking_whatever_size_it_is_attached_with(share):
    class Padding(Vit):
        def embed(self, images):
            more = -images.shape[3] % 48
            first = more // share if share else 0
            tokens = self.stem(nn.functional.pad(images, (first, more - first))).flatten(2).transpose(1, 2)
            return tokens + self.position.repeat(1, -(-tokens.shape[1] // PATCHES), 1)[:, : tokens.shape[1]]

    model = Padding().eval()
    assert attach(model).masking == "pixels"
    with pytest.raises(EncoderError, match='masking="tokens".*pads or resizes its images'):
        attach(model, masking="tokens")
