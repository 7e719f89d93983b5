"""Models that leave out tokens in training: masked passes hide patches by their own mask alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.objectives import Rotation

SIZE = (32, 48)


class Dropping(nn.Module):
    """A plain transformer that drops half of its tokens in training, in its own forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 32, 0.1, batch_first=True) for _ in range(2))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def drop(self, tokens):
        return tokens[:, torch.randperm(tokens.shape[1])[: tokens.shape[1] // 2]] if self.training else tokens

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.drop(self.stem(x).flatten(2).transpose(1, 2)))).mean(1))


class Drop(nn.Module):
    def forward(self, tokens):
        return tokens[:, ::2] if self.training else tokens


class DroppingTwice(Dropping):
    """It drops in a module of its own, and between the blocks once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Drop()
        self.blocks = nn.Sequential(self.blocks[0], nn.Sequential(nn.Dropout(0.5), Drop()), self.blocks[1])

    def drop(self, tokens):
        return self.first(tokens)


MODELS = {
    "timm": (lambda: zoo.vit(patch_drop_rate=0.5), "norm", "tokens", ["patch_drop"]),
    "timm with registers": (lambda: zoo.vit(patch_drop_rate=0.25, reg_tokens=4), "norm", "tokens", ["patch_drop"]),
    "timm features": (
        lambda: zoo.timm_model(
            "vit_tiny_patch16_224", **zoo.TINY_VIT, features_only=True, out_indices=(0, 1), patch_drop_rate=0.5
        ),
        "",
        "tokens",
        ["model.patch_drop"],
    ),
    "timm, rotary": (
        lambda: zoo.timm_model("vit_tiny_patch16_dinov3_qkvb", **zoo.TINY_VIT, patch_drop_rate=0.5),
        "norm",
        "tokens",
        ["patch_drop"],
    ),
    "in its own forward": (Dropping, "norm", "tokens", [""]),
    "twice": (DroppingTwice, "norm", "pixels", ["first", "blocks.1.1"]),
}


@pytest.mark.parametrize("masking", ["auto", "pixels"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_drops_patches_trains_on_masked_images(name, masking):
    make, encoder, expected, droppers = MODELS[name]
    model = make().train()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, encoder, masking=masking, patch_size=8)
    paths = {module: path for path, module in model.named_modules()}
    assert branch.masking == (expected if masking == "auto" else "pixels")
    assert [paths[m] for m in branch.info.token_droppers] == droppers
    with left_as_it_was(model, "grads"):
        branch.loss(torch.randn(2, 3, 64, 80)).backward()
    assert all(p.grad is not None for p in branch.encoder_parameters().values())
    assert all(module.training for module in model.modules())


def test_the_random_state_is_left_alone_by_the_trial():
    model = Dropping().train()
    MAEBranch.attach(model, "norm", image_size=SIZE, patch_size=8)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    MAEBranch.attach(model, "norm", decoder=_NoWeights, masking="pixels", image_size=SIZE, patch_size=8)
    assert torch.equal(torch.rand(4), expected)


class _NoWeights(nn.Module):
    """A decoder that draws no random weights."""

    def __init__(self, specs) -> None:
        super().__init__()
        self.stride, self.weight = specs[0].stride, nn.Parameter(torch.zeros(1))

    def forward(self, features):
        h, w = features.maps[0].shape[-2:]
        return self.weight.expand(len(features.maps[0]), 3, h * self.stride, w * self.stride)


def test_the_main_task_goes_on_to_drop_patches():
    model = Dropping().train()
    branch = MAEBranch.attach(model, "norm", image_size=SIZE, patch_size=8)
    lengths = []
    model.norm.register_forward_hook(lambda _m, _a, out: lengths.append(out.shape[1]))
    branch.loss(torch.randn(1, 3, *SIZE))
    model(torch.randn(1, 3, *SIZE))
    assert lengths == [24, 12]


def test_rotations_see_all_tokens_too():
    model = Dropping().train()
    Rotation.attach(model, "norm", image_size=SIZE).loss(torch.randn(2, 3, *SIZE)).backward()


def test_a_model_whose_training_pass_has_another_output_in_any_case_is_refused():
    class Folded(Dropping):
        """Its forward, and a function that looks at the flag of another module, drop together."""

        def drop(self, tokens):
            return tokens[:, ::2] if self.training or self.head.training else tokens

    with left_as_it_was(model := Folded()), pytest.raises(EncoderError, match="in training mode .*12, 16.*24, 16"):
        MAEBranch.attach(model, "norm", image_size=SIZE)


def test_a_model_that_needs_labels_in_training_is_attached_to_all_the_same():
    class Labelled(Dropping):
        def drop(self, tokens):
            if self.training:
                raise ValueError("labels are needed in training")
            return tokens

    model = Labelled()
    branch = MAEBranch.attach(model, "norm", image_size=SIZE, patch_size=8)
    model.eval()
    assert branch.loss(torch.randn(1, 3, *SIZE)).isfinite()
