"""Which encoders are found in a model, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.encoder import inspect_encoder
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.model.stem import hidden_on_map


def test_an_unknown_path_comes_with_the_nearest_names():
    with pytest.raises(EncoderError, match="UNet has no module 'encodr'; nearest: 'encoder'"):
        MAEBranch.attach(zoo.UNet(), "encodr")


def test_an_empty_path_is_the_whole_model():
    model = zoo.resnet_features()
    assert MAEBranch.attach(model, encoder="").info.module is model


def test_an_encoder_that_is_never_reached_is_refused():
    model = zoo.UNet()
    model.spare = nn.Conv2d(3, 4, 3)
    with left_as_it_was(model), pytest.raises(EncoderError, match="Conv2d.*never reached"):
        MAEBranch.attach(model, "spare")
    model.unused = nn.ModuleList([nn.Conv2d(3, 4, 3)])
    with left_as_it_was(model), pytest.raises(EncoderError, match="never reached"):
        MAEBranch.attach(model, "unused")


def test_a_list_that_the_model_loops_over_ends_where_its_last_member_ends():
    model = zoo.WindowNet()
    assert inspect_encoder(model, "stage").module is model.stage[1]


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())])
def test_pooled_features_are_refused_with_a_hint(pool):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), pool)
    with left_as_it_was(model), pytest.raises(EncoderError, match="name an earlier module, before.*pooled"):
        MAEBranch.attach(model, "1")


def test_a_model_without_parameters_is_refused():
    with pytest.raises(EncoderError, match="no parameters.*nothing to adapt"):
        MAEBranch.attach(nn.Sequential(nn.AvgPool2d(4)), "0")


def test_an_encoder_without_parameters_or_gradient_is_refused():
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 8, 1))
    with left_as_it_was(model), pytest.raises(EncoderError, match="no gradient"):
        MAEBranch.attach(model, "0")

    class Closed(zoo.PlainSeg):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(EncoderError, match=r"torch.no_grad\(\)"):
        MAEBranch.attach(Closed(), "backbone")


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model = zoo.PlainSeg()
    with pytest.raises(EncoderError, match="inference_mode"):
        MAEBranch.attach(model, "backbone")


class Scaled(nn.Module):
    """Its only weight is a factor for the whole image."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.factor


def test_a_model_without_a_first_layer_is_refused_for_pixels():
    model = nn.Sequential(nn.Sequential(Scaled(), nn.AvgPool2d(4)), nn.Flatten())
    with left_as_it_was(model), pytest.raises(EncoderError, match="stem"):
        MAEBranch.attach(model, "0")


class SpaceToDepth(nn.Module):
    """A convolution behind a rearrangement of pixels, as in TResNet."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(48, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.body(nn.functional.pixel_unshuffle(x, 4)))


class LinearPatches(nn.Module):
    """Patches by a linear layer, with a token in front, as in NaFlex."""

    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Linear(192, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.mix, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        patches = nn.functional.unfold(x, 8, stride=8).transpose(1, 2)  # [B, N, 192]
        tokens = torch.cat([self.first.expand(len(x), -1, -1), self.embed(patches)], 1)
        return self.head(self.mix(tokens.transpose(1, 2)).transpose(1, 2))


class LinearPixels(nn.Module):
    """A linear layer over the colours of each pixel, channels last."""

    def __init__(self):
        super().__init__()
        self.body, self.pool = nn.Linear(3, 8), nn.AvgPool2d(4)

    def forward(self, x):
        return self.pool(self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("make", "encoder", "stem", "stride"),
    [(SpaceToDepth, "body", "body", 4), (LinearPatches, "mix", "embed", 8), (LinearPixels, "pool", "body", 1)],
)
def test_a_first_layer_that_is_no_convolution_over_the_image_is_told_of_hidden_pixels(make, encoder, stem, stride):
    model = make().eval()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, encoder, patch_size=8, image_size=(32, 48))
    assert (branch.masking, branch.info.stem_path, branch.info.stem_map.stride) == ("pixels", stem, stride)
    layer, hidden = model.get_submodule(stem), (torch.rand(2, 1, 32, 48) < 0.5).float()
    given = inputs_at(model, layer, torch.randn(2, 3, 32, 48))
    nn.init.ones_(branch.mask_channel.weight)
    with torch.no_grad(), hidden_on_map(layer, branch.info.stem_map, branch.mask_channel, hidden):
        added = layer(*given) - layer.forward(*given)
    counts = nn.functional.avg_pool2d(hidden, stride) * stride**2  # how many pixels of each cell are hidden
    cells = added.mean(1) if make is SpaceToDepth else added.mean(-1)
    torch.testing.assert_close(cells.flatten(1), counts.flatten(1), rtol=1e-4, atol=1e-3)
    branch.loss(torch.randn(2, 3, 32, 48)).backward()
    assert branch.mask_channel.weight.grad.abs().sum() > 0


def inputs_at(model: nn.Module, layer: nn.Module, images: torch.Tensor) -> tuple:
    """What the model calls a layer with."""
    seen = {}
    with hooks([layer.register_forward_pre_hook(lambda _m, args: seen.update(args=args))]), torch.no_grad():
        model(images)
    return seen["args"]


def test_a_model_that_takes_no_image_says_what_was_tried():
    class Fussy(zoo.PlainSeg):
        def forward(self, x):
            if x.shape[-1] != 48:
                raise RuntimeError("only 48 wide")
            return super().forward(x)

    with pytest.raises(EncoderError, match=r"tried 128 x 160: RuntimeError: only 48 wide.*image_size=\(H, W\)"):
        MAEBranch.attach(Fussy(), "backbone")
    assert MAEBranch.attach(Fussy(), "backbone", image_size=(32, 48)).info.probe_size == (32, 48)


class WithDepth(zoo.PlainSeg):
    def forward(self, x, depth, *, scale=1.0):
        return super().forward(x + scale * depth)


class Clips(nn.Module):
    """Takes clips [B, 3, T, H, W]."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        b, _, t, _, _ = x.shape
        return self.head(self.stem(x).mean((2, 3, 4))).expand(b, 2) / t


class ClipsOfFrames(nn.Module):
    """Takes clips [B, T, 3, H, W], frame by frame."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 2)

    def forward(self, x):
        b, t, c, h, w = x.shape
        return self.head(self.embed(x.reshape(b * t, c, h, w)).mean((2, 3)).unflatten(0, (b, t)).mean(1))


class Patches(nn.Module):
    """Takes patches [B, N, 3 * 8 * 8]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(192, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def channels(count):
    return nn.Sequential(nn.Sequential(nn.Conv2d(count, 8, 4, 4), nn.BatchNorm2d(8), nn.GELU()), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (WithDepth(), r"its forward also needs depth: wrap the model in a module whose forward takes the images alone"),
        (Clips(), r"^the model takes clips of video \[B, C, T, H, W\], not images \[B, C, H, W\]. Its first.*Conv3d"),
        (ClipsOfFrames(), r"^the model takes clips of video \[B, T, C, H, W\], not images.*runs on random clips"),
        (Patches(), r"Linear over 192 numbers, so it takes images that are cut into patches of 8 x 8 already"),
        (channels(1), r"takes 1 channel\(s\), and frames have three \(RGB\): wrap.*x.mean\(1, keepdim=True\)"),
        (
            channels(4),
            r"takes 4 channel\(s\), and frames have three \(RGB\): wrap.*F.pad.*nothing but RGB",
        ),
    ],
    ids=["two inputs", "video", "video by frames", "patches", "grey", "four channels"],
)
@pytest.mark.parametrize("encoder", ["auto", "0"])
def test_a_model_that_takes_other_inputs_is_refused_with_the_reason_and_the_way_out(model, reason, encoder):
    encoder = "auto" if encoder == "auto" or not isinstance(model, nn.Sequential) else encoder
    with left_as_it_was(model), pytest.raises(EncoderError, match=reason):
        MAEBranch.attach(model, encoder)


class OfRGB(nn.Module):
    """The wrapper that the refusal of a model of other channels advises."""

    def __init__(self, count):
        super().__init__()
        self.count, self.inner = count, channels(count)

    def forward(self, x):
        more = (0, 0, 0, 0, 0, self.count - 3)
        return self.inner(x.mean(1, keepdim=True) if self.count == 1 else nn.functional.pad(x, more))


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_model_of_other_channels_in_the_wrapper_that_the_refusal_advises_trains_calibrates_and_streams(count):
    torch.manual_seed(0)
    model = OfRGB(count)
    branch = MAEBranch.attach(model)
    branch.loss(torch.randn(2, 3, 32, 48)).backward()
    assert model.inner[0][0].weight.grad.abs().sum() > 0
    branch.calibrate(list(torch.randn(8, 3, 32, 48)))
    with StreamAdapter(model, branch) as adapter:
        assert adapter.step(torch.randn(3, 32, 48)).isfinite().all()
        assert adapter.last.adapted


def test_a_frozen_encoder_is_found_as_well_and_stays_frozen():
    model = zoo.UNet().requires_grad_(False)
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, "encoder")
    assert len(branch.encoder_parameters()) == len(list(model.encoder.parameters()))


def test_the_encoder_may_be_given_as_a_module():
    model = zoo.UNet()
    by_name, by_module = (MAEBranch.attach(model, encoder) for encoder in ("encoder", model.encoder))
    assert by_module.info.path == by_name.info.path == "encoder"
    assert list(by_module.encoder_parameters()) == list(by_name.encoder_parameters())


def test_batchnorm_of_the_encoder_alone_is_held_still_by_the_branch():
    model = settle_norms(zoo.UNet())
    branch = MAEBranch.attach(model, "encoder")
    assert {id(n) for n in branch.info.norms} == {id(n) for n in norm_layers(model.encoder)}


def test_norms_without_weights_are_held_still_where_a_masked_pass_calls_them():
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 8, 4, 4),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5, affine=False),
    ).train()
    branch = MAEBranch.attach(model, "2")
    assert branch.info.norms == [model[0], model[2]]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    branch.loss(torch.randn(2, 3, 32, 48)).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    plain = list(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # what distributed training puts in their place
    assert model[0] is not plain[0]
    assert branch.info.norms == [model[0], model[2]]
    model[0] = nn.Sequential(plain[0])  # a wrapper around a layer that was seen
    assert branch.info.norms == [plain[0], model[2]]


def test_norms_without_weights_that_only_the_head_calls_are_none_of_the_encoders():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body = nn.BatchNorm2d(5, affine=False), nn.Conv2d(3, 5, 4, 4)

        def forward(self, x):
            return self.norm(self.body(x))

    assert MAEBranch.attach(Tail(), "body").info.norms == []


@pytest.mark.parametrize("encoder", [None, 3, ["encoder"]])
def test_an_encoder_that_is_no_path_is_refused_with_names_to_choose_from(encoder):
    model = zoo.UNet()
    with left_as_it_was(model), pytest.raises(EncoderError, match=r"encoder is .*expected the dotted path.*nearest: '"):
        MAEBranch.attach(model, encoder)
