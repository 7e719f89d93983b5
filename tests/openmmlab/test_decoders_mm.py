"""copy_head for the heads of mmsegmentation and mmdetection, against the original heads and formulas written out."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

import tiny
from conftest import mix_flags, photograph, settle_norms
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.integration import Features
from ttt_adapt_openmmlab import branch_for
from ttt_adapt_openmmlab.decoders import MaskHeadCopy

MASK_HEADS = {
    "semantic": (tiny.mask2former_semantic, "decode_head"),
    "instance": (tiny.mask2former, "panoptic_head"),
    "panoptic": (lambda: tiny.mask2former(2, 2), "panoptic_head"),
}
MAP_HEADS = {
    "fcn": (tiny.fcn, "decode_head.conv_seg"),
    "upernet": (tiny.upernet, "decode_head.conv_seg"),
    "deeplabv3plus": (tiny.deeplabv3plus, "decode_head.conv_seg"),
    "segformer": (tiny.segformer, "decode_head.conv_seg"),
}


def attached(config: dict, **settings) -> tuple[nn.Module, MAEBranch]:
    model = tiny.build(config).eval()
    return model, branch_for(model, decoder="copy_head", **settings)


def features(model: nn.Module, images: torch.Tensor) -> Features:
    raw = model.backbone(images)
    return Features(list(raw), raw, tuple(images.shape[-2:]))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, *tiny.SIZE)


# ---- Mask2Former


@pytest.mark.parametrize("kind", MASK_HEADS)
def test_the_copied_pixel_decoder_gives_the_mask_features_of_the_original(kind, images):
    make, name = MASK_HEADS[kind]
    model, branch = attached(make())
    assert type(branch.decoder) is MaskHeadCopy
    with torch.no_grad():
        maps = model.backbone(images)
        expected, expected_levels = getattr(model, name).pixel_decoder(maps)
        got, levels = branch.decoder.head.pixel_decoder(maps)
    assert torch.equal(expected, got)
    assert all(torch.equal(a, b) for a, b in zip(expected_levels, levels, strict=True))


@pytest.mark.parametrize("kind", MASK_HEADS)
def test_only_queries_are_new_and_only_the_class_head_is_gone(kind):
    make, name = MASK_HEADS[kind]
    model, branch = attached(make())
    original, own = getattr(model, name).state_dict(), branch.decoder.head.state_dict()
    queries = {"query_feat.weight", "query_embed.weight"}
    assert {key for key in original if key not in own} == {"cls_embed.weight", "cls_embed.bias"}
    assert not [key for key in own if key not in original]
    assert all(torch.equal(own[key], original[key]) for key in own if key not in queries)
    assert {tuple(own[key].shape) for key in queries} == {(48, 16)}
    assert not {p.data_ptr() for p in branch.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("kind", MASK_HEADS)
def test_the_image_is_the_last_layer_s_48_masks_shuffled_to_pixels(kind, images):
    make, _ = MASK_HEADS[kind]
    model, branch = attached(make())
    with torch.no_grad():
        given = features(model, images)
        _, masks = branch.decoder.head(given.raw, [SimpleNamespace(metainfo={})] * 2)
        last = masks[-1]
        painted = branch.decoder(given)
    h, w = tiny.SIZE
    assert last.shape == (2, 48, h // 4, w // 4)
    by_hand = torch.empty(2, 3, h, w)
    for color in range(3):
        for row in range(4):
            for column in range(4):
                by_hand[:, color, row::4, column::4] = last[:, color * 16 + row * 4 + column]
    assert torch.equal(painted, by_hand)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_no_gradient_reaches_does_not_ask_for_one(layers, images):
    _, branch = attached(tiny.mask2former_semantic(layers=layers))
    branch.loss(images).backward()
    asks = {name for name, p in branch.named_parameters() if p.requires_grad}
    gets = {name for name, p in branch.named_parameters() if p.grad is not None}
    assert asks == gets
    assert {"decoder.head.query_feat.weight", "decoder.head.mask_embed.4.weight", "mask_channel.weight"} <= gets


def test_any_image_size_is_painted():
    _, branch = attached(tiny.mask2former_semantic())
    for size in ((64, 96), (70, 101), (33, 48)):
        result = branch.reconstruct(torch.randn(1, 3, *size))
        assert result.prediction.shape == (1, 3, *size)
        assert torch.isfinite(result.loss)


def test_a_neck_between_backbone_and_head_is_copied_with_the_head(images):
    config = tiny.fcn()
    config["neck"] = {"type": "FPN", "in_channels": [8, 16, 32, 64], "out_channels": 64, "num_outs": 4}
    config["auxiliary_head"]["in_channels"] = 64
    model, branch = attached(config)
    branch.loss(images).backward()
    assert any(p.grad is not None for p in branch.decoder.head.neck.parameters())

    config = tiny.mask2former_semantic()
    config["neck"] = {"type": "FPN", "in_channels": [16, 32, 64, 128], "out_channels": 16, "num_outs": 4}
    config["decode_head"]["in_channels"] = [16] * 4
    model, branch = attached(config)
    with torch.no_grad():
        maps = model.backbone(images)
        expected = model.decode_head.pixel_decoder(model.neck(maps))[0]
        assert torch.equal(branch.decoder.head.pixel_decoder(branch.decoder.neck(maps))[0], expected)
    assert branch.reconstruct(images).prediction.shape == images.shape


def maskformer() -> dict:
    """The older MaskFormer, with mmdet's plain pixel decoder."""
    config = tiny.mask2former()
    head = copy.deepcopy(config["panoptic_head"])
    for key in ("strides", "num_transformer_feat_level"):
        del head[key]
    head["type"] = "MaskFormerHead"
    head["pixel_decoder"] = {
        "type": "PixelDecoder",
        "norm_cfg": {"type": "GN", "num_groups": 4},
        "act_cfg": {"type": "ReLU"},
    }
    return {**config, "type": "MaskFormer", "panoptic_head": head}


def test_a_maskformer_head_is_copied_too(images):
    _, branch = attached(maskformer())
    assert type(branch.decoder) is MaskHeadCopy
    assert branch.decoder.head.query_embed.weight.shape == (48, 16)
    branch.loss(images).backward()
    assert not [name for name, p in branch.named_parameters() if p.requires_grad and p.grad is None]
    assert branch.reconstruct(images).prediction.shape == images.shape


def test_a_backbone_without_one_map_per_stride_is_refused():
    config = tiny.mask2former_semantic()
    model = tiny.build(config).eval()
    specs = [SimpleNamespace(index=1, layout="nchw", channels=16, stride=4)]
    with pytest.raises(EncoderError, match="one.*map per stride"):
        MaskHeadCopy(model, "decode_head", specs)


# ---- heads that end in a convolution


@pytest.mark.parametrize("kind", MAP_HEADS)
def test_the_last_convolution_is_replaced_and_the_rest_of_the_head_is_the_original(kind, images):
    make, last = MAP_HEADS[kind]
    model = settle_norms(tiny.build(make()))
    branch = branch_for(model, decoder="copy_head")
    decoder = branch.decoder
    assert (type(decoder).__name__, decoder.last) == ("HeadCopy", last)
    seen = {}

    def remember(key):
        return lambda _module, args: seen.__setitem__(key, args[0].detach().clone())

    handles = [
        model.get_submodule(last).register_forward_pre_hook(remember("original")),
        decoder.head.get_submodule(last).register_forward_pre_hook(remember("copy")),
    ]
    branch.eval()
    with torch.no_grad():
        model(images)
        decoder(features(model, images))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["original"], seen["copy"])
    stride = tiny.SIZE[0] // seen["copy"].shape[-2]
    assert decoder.head.get_submodule(last).out_channels == 3 * stride**2


@pytest.mark.parametrize("kind", MAP_HEADS)
def test_map_heads_learn_to_paint(kind):
    model, branch = attached(MAP_HEADS[kind][0]())
    smooth = model.data_preprocessor(tiny.batch(MAP_HEADS[kind][0]()), False)["inputs"]
    trained = [*branch.encoder_parameters().values(), *(p for p in branch.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = branch.loss(smooth, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.96 * losses[0]
    assert not [name for name, p in branch.named_parameters() if p.requires_grad and p.grad is None]


# ---- everything else


@pytest.fixture
def warnings_logged():
    """Messages of MMEngine's current logger at level warning."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_a_two_stage_detector_gets_the_convolutional_decoder_and_the_log_says_so(images, warnings_logged):
    model, branch = attached(tiny.mask_rcnn())
    assert type(branch.decoder).__name__ == "ConvDecoder"
    assert [m for m in warnings_logged if "MaskRCNN" in m and "convolutional decoder" in m]
    branch.loss(images).backward()
    assert model.backbone.conv1.weight.grad is not None


def test_a_mask_head_behind_another_encoder_gets_the_convolutional_decoder(warnings_logged):
    config = tiny.mask2former()
    config["backbone"] = tiny.resnet()
    config["panoptic_head"]["in_channels"] = [8, 16, 32, 64]
    _, branch = attached(config, encoder="backbone.layer3")
    assert type(branch.decoder).__name__ == "ConvDecoder"
    assert [m for m in warnings_logged if "reads what the backbone returns" in m]


def test_an_encoder_that_does_not_exist_is_refused_and_not_replaced():
    model = tiny.build(tiny.fcn())
    with pytest.raises(EncoderError, match="no module 'backbon'"):
        branch_for(model, encoder="backbon", decoder="copy_head")


def test_other_decoders_go_to_the_core_as_they_are():
    model = tiny.build(tiny.fcn())
    assert type(branch_for(model).decoder).__name__ == "ConvDecoder"
    assert type(branch_for(model, decoder=lambda specs: Paint(specs)).decoder) is Paint


class Paint(nn.Module):
    def __init__(self, specs):
        super().__init__()
        self.stride = specs[0].stride
        self.out = nn.Conv2d(specs[0].channels, 3 * self.stride**2, 1)

    def forward(self, given):
        return nn.functional.pixel_shuffle(self.out(given.maps[0]), self.stride)


@pytest.mark.parametrize("make", [tiny.mask2former_semantic, lambda: tiny.mask2former(2, 2), tiny.fcn, tiny.segformer])
def test_attaching_leaves_the_model_as_it_was(make):
    model = tiny.build(make())
    mix_flags(model)
    before = photograph(model)
    branch = branch_for(model, decoder="copy_head")
    branch.loss(torch.randn(1, 3, *tiny.SIZE))
    branch.detach()
    assert photograph(model) == before


@pytest.mark.parametrize("make", [tiny.mask2former_semantic, tiny.upernet])
def test_a_renewed_copy_has_the_weights_that_the_head_has_now(make):
    model, branch = attached(make())
    fresh = {key: value.clone() for key, value in branch.decoder.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    branch.decoder.renew(model)
    now = branch.decoder.state_dict()
    kept = {key for key in fresh if torch.equal(fresh[key], now[key]) and fresh[key].is_floating_point()}
    new_layers = {key for key in kept if "query" in key or "conv_seg" in key}
    assert new_layers
    assert {key for key in kept - new_layers if "running" not in key} == set()
