"""What `MAEBranch` promises on particular encoders: which masking it takes, and which settings it refuses."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models as zoo
from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.errors import ConfigError, EncoderError, FrameError
from ttt_adapt.objectives.masking import hidden_patches, upsample_mask

# ---- pixels on plain ViTs, and the models that must never lose a token


@pytest.mark.parametrize(("make", "patch"), [(zoo.vit, 16), (zoo.eva, 14), (zoo.vit_features, 16)])
def test_a_plain_vit_takes_pixel_masking_too(make, patch):
    model = make()
    branch = MAEBranch.attach(model, model if make is zoo.vit_features else "norm", masking="pixels")
    assert branch.masking == "pixels"
    assert branch.patch_size == 16
    images = torch.randn(2, 3, 50, 71)
    out = branch.reconstruct(images)
    assert out.prediction.shape == images.shape
    assert branch.draw_mask(images).shape == (2, 4, 5)
    whole = torch.randn(1, 3, 4 * patch, 5 * patch)  # whole tokens, which are no whole patches where they are 14 wide
    assert branch.draw_mask(whole).shape == (1, 4, 5)
    assert branch.reconstruct(whole).prediction.shape == whole.shape


def test_pixel_masks_that_do_not_meet_the_tokens_still_hide_exactly_their_patches():
    """Patch 16 on a model with tokens of 14: the frame is padded to the tokens and the mask stays on its own grid."""
    model = zoo.eva().eval()
    branch = MAEBranch.attach(model, "norm", masking="pixels", norm_pix_loss=True)
    images = torch.randn(1, 3, 50, 71)
    mask = branch.draw_mask(images)
    visible = upsample_mask(mask, 16)[..., :50, :71]
    other = torch.where(visible, images, torch.randn_like(images))
    seen = []  # as the loss sees it: `reconstruct` returns it scaled by the statistics of the hidden patches
    branch.decoder.register_forward_hook(lambda _m, _a, prediction: seen.append(prediction))
    assert branch.reconstruct(images, mask=mask).prediction.shape == images.shape
    branch.reconstruct(other, mask=mask)
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("make", "encoder"),
    [
        (zoo.beit, "blocks"),
        (lambda: zoo.beit(init_values=1e-5), "blocks"),
        (zoo.swin, "norm"),
        (zoo.swin_features, ""),
        (zoo.WindowNet, "norm"),
        (lambda: zoo.WindowNet(table=False), "norm"),
        (zoo.resnet, "layer4"),
        (zoo.UNet, "encoder"),
    ],
    ids=["beit", "beit scaled", "swin", "swin features", "windows of tokens", "windows, no table", "resnet", "unet"],
)
def test_windowed_and_relative_position_models_never_get_token_masking(make, encoder):
    model = make()
    assert MAEBranch.attach(model, encoder).masking == "pixels"
    with left_as_it_was(model), pytest.raises(EncoderError, match='masking="tokens" needs a plain transformer.*pixels'):
        MAEBranch.attach(model, encoder, masking="tokens")


def test_the_patch_size_is_rounded_to_whole_tokens():
    model = zoo.eva()
    for asked, given in ((1, 14), (16, 14), (24, 28), (28, 28)):
        assert MAEBranch.attach(model, "norm", patch_size=asked).patch_size == given


def test_patches_of_several_tokens_hide_them_together():
    model = zoo.vit().eval()
    branch = MAEBranch.attach(model, "norm", patch_size=32, mask_ratio=0.75)
    images = torch.randn(2, 3, 70, 100)
    mask = branch.draw_mask(images)
    assert mask.shape == (2, 3, 4)
    every, kept = [], []  # tokens in front of the blocks, and those that the first block sees
    model.norm_pre.register_forward_hook(lambda _m, _a, tokens: every.append(tokens[:, 1:]))
    model.blocks[0].norm1.register_forward_pre_hook(lambda _m, args: kept.append(args[0][:, 1:]))
    assert branch.reconstruct(images, mask=mask).prediction.shape == images.shape
    assert every[0].shape[:2] == (2, 6 * 8)
    assert kept[0].shape[:2] == (2, 3 * 4)
    for i in range(2):
        order = (every[0][i] == kept[0][i][:, None]).all(-1).nonzero()[:, 1].tolist()
        assert len(order) == 3 * 4
        assert order == sorted(order)
        cells = {(n // 8 // 2, n % 8 // 2) for n in order}
        assert cells == {tuple(cell) for cell in mask[i].nonzero().tolist()}


# ---- settings, masks and sizes


@pytest.mark.parametrize("value", ["no", 1, None])
def test_the_patch_normalisation_is_true_or_false(value):
    with pytest.raises(ConfigError, match="norm_pix_loss is .*expected True or False"):
        MAEBranch.attach(zoo.PlainSeg(), "backbone", norm_pix_loss=value)
    branch = MAEBranch.attach(zoo.PlainSeg(), "backbone")
    with pytest.raises(ConfigError, match="norm_pix_loss"), branch.using(norm_pix_loss=value):
        pass
    assert branch.norm_pix_loss is False


def test_a_given_mask_draws_no_other():
    branch, images = MAEBranch.attach(zoo.PlainSeg(), "backbone"), torch.randn(2, 3, 32, 40)
    mask, generator = branch.draw_mask(images), torch.Generator().manual_seed(3)
    states = generator.get_state(), torch.get_rng_state()
    branch.reconstruct(images, mask=mask, generator=generator)
    branch.reconstruct(images, mask=mask)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    with pytest.raises(ConfigError, match=r"mask is \(2, 2, 2\).*expected bool \(2, 2, 3\)"):
        branch.reconstruct(images, mask=mask[..., :2])


def test_a_size_that_the_model_refuses_is_told_with_the_users_own_numbers():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    branch = MAEBranch.attach(model, "norm")
    with pytest.raises(FrameError, match=r"does not take images of \(100, 90\).*\(112, 96\)"):
        branch.loss(torch.randn(1, 3, 100, 90))


# ---- Hugging Face


def _hf(name: str, **extra) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'ttt-adapt[test]'")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, **extra)
    return getattr(transformers, f"{name}Model")(config).eval()


HUGGING_FACE = {
    "ViT": (lambda: _hf("ViT", image_size=64, patch_size=16), "layernorm", 16, 1, (64, 64)),
    "DINOv2": (lambda: _hf("Dinov2", image_size=56, patch_size=14), "layernorm", 14, 1, (50, 71)),
    "DINOv2 with registers": (
        lambda: _hf("Dinov2WithRegisters", image_size=56, patch_size=14, num_register_tokens=3),
        "layernorm",
        14,
        4,
        (50, 71),
    ),
    "DINOv3": (
        lambda: _hf("DINOv3ViT", image_size=64, patch_size=16, num_register_tokens=2),
        "norm",
        16,
        3,
        (50, 71),
    ),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_vits_are_masked_by_tokens_and_left_as_they_were(family):
    make, encoder, patch, prefix, size = HUGGING_FACE[family]
    model = make()
    images = torch.randn(2, 3, *size)
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, encoder)
        out = branch.reconstruct(images)
    assert branch.masking == "tokens"
    assert (branch.info.tokens.patch_size, branch.info.tokens.prefix) == (patch, prefix)
    assert out.prediction.shape == images.shape
    branch.loss(images).backward()
    assert all(p.grad is not None for p in branch.encoder_parameters().values())
    mask = branch.draw_mask(images)
    visible = upsample_mask(mask, patch)[..., : size[0], : size[1]]
    other = torch.where(visible, images, torch.randn_like(images))
    same = [branch.reconstruct(x, mask=mask).prediction for x in (images, other)]
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_blocks_see_the_visible_tokens_only(family):
    make, encoder, patch, prefix, _ = HUGGING_FACE[family]
    model = make()
    branch = MAEBranch.attach(model, encoder)
    lengths = []
    for block in branch.info.tokens.blocks:
        block.register_forward_hook(lambda _m, args, out: lengths.append(args[0].shape[1]))
    images = torch.randn(1, 3, 4 * patch, 4 * patch)
    branch.reconstruct(images)
    assert lengths == [prefix + 16 - hidden_patches(16, 0.8)] * 2


class _MoreInTraining(nn.Module):
    """An encoder that returns a further map in training, before the one that it always returns.

    Args:
        inside: whether a module inside of the encoder decides that, and not the encoder itself.
    """

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 4, 4), nn.Sequential(nn.Conv2d(4, 8, 3, 1, 1), nn.Dropout(0.5))
        self.inside = inside

    def forward(self, x):
        first = self.stem(x)
        return (first, self.body(first)) if (self.body if self.inside else self).training else self.body(first)


class _Behind(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.backbone, self.head = _MoreInTraining(inside), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        found = self.backbone(x)
        return self.head(found[-1] if isinstance(found, tuple) else found)


def test_an_encoder_with_further_outputs_in_training_is_trained_on_those_of_evaluation():
    model = _Behind(inside=False).train()
    branch = MAEBranch.attach(model, "backbone", patch_size=8)
    branch.train()
    dropped = []
    model.backbone.body[1].register_forward_hook(lambda m, _args, _output: dropped.append(m.training))
    branch.loss(torch.randn(2, 3, 32, 32)).backward()
    assert dropped == [True]
    assert model.backbone.body[0].weight.grad.abs().sum() > 0
    assert model.backbone.training


def test_an_encoder_that_returns_other_maps_in_training_whatever_is_done_is_refused_with_the_reason():
    branch = MAEBranch.attach(_Behind(inside=True).train(), "backbone", patch_size=8)
    with pytest.raises(EncoderError, match=r"something else than when it was examined.*expected 8 channels"):
        branch.loss(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("decoder", ["conv", "copy_head"])
@pytest.mark.parametrize("used", [False, True])
def test_a_detached_branch_does_not_keep_the_model_alive(decoder, used):
    model = zoo.TinySeg()
    branch = MAEBranch.attach(model, "backbone", decoder)
    if used:
        branch.loss(torch.randn(1, 3, 32, 48)).backward()
    before = {name: value.clone() for name, value in branch.state_dict().items()}
    alive = weakref.ref(model)
    branch.detach()
    branch.detach()
    del model
    gc.collect()
    assert alive() is None
    assert branch.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in branch.state_dict().items())


class OfOneSize(nn.Module):
    """As SSD300: images are resized to a size that is no whole number of patches; the cells at its end reach beyond."""

    def __init__(self, side: int = 36, padding: int = 2) -> None:
        super().__init__()
        self.side, self.head = side, nn.Conv2d(8, 4, 1)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 8, 8, padding), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[-2:]) != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side))
        return self.head(self.backbone(x))


def test_a_model_of_one_size_that_is_no_whole_number_of_patches_is_masked_at_this_size():
    branch = MAEBranch.attach(OfOneSize())
    assert (branch.info.probe_size, branch.info.maps[0].stride) == ((36, 36), 8)
    images = branch.info.probe_images()
    shown = branch.reconstruct(images)
    assert shown.prediction.shape == images.shape
    hidden = branch.reconstruct(torch.where(shown.mask, images, 7.0), mask=shown.mask[:, 0, ::16, ::16])
    assert torch.equal(hidden.prediction, shown.prediction)
    with pytest.raises(EncoderError, match="resizes its images inside"):
        branch.loss(torch.randn(1, 3, 48, 64))


def test_a_model_of_one_size_whose_maps_leave_out_a_border_is_refused():
    with pytest.raises(EncoderError):
        MAEBranch.attach(OfOneSize(padding=0))
