from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, settle_norms
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import Features, MapSpec
from ttt_adapt.model.hooks import run_encoder
from ttt_adapt.objectives.decoders import ConvDecoder, HeadCopy, Pyramid, TokenDecoder, sincos_positions
from ttt_adapt.tasks.dense_model import SegmentationModel


def segmentation() -> nn.Module:
    return SegmentationModel("resnet18", 5, width=16, encoder_options={"channels": (8, 16, 24, 32)})


def segmentation_vit() -> nn.Module:
    return SegmentationModel("vit_tiny_patch16_224", 5, width=16, encoder_options=dict(zoo.TINY_VIT))


CASES = {
    "conv on a CNN": (zoo.resnet, "layer4", "conv", ConvDecoder),
    "conv on a pyramid": (zoo.resnet_features, "", "conv", ConvDecoder),
    "conv on a ViT": (zoo.vit, "norm", "conv", ConvDecoder),
    "transformer on a ViT": (zoo.vit, "norm", "transformer", TokenDecoder),
    "transformer on a CNN": (zoo.resnet, "layer4", "transformer", TokenDecoder),
    "copy of a U-Net's head": (zoo.UNet, "encoder", "copy_head", HeadCopy),
    "copy of a U-Net's head, dict": (lambda: zoo.UNet(as_dict=True), "encoder", "copy_head", HeadCopy),
    "copy of a segmentation head": (segmentation, "backbone", "copy_head", HeadCopy),
    "copy of a segmentation head on a ViT": (segmentation_vit, "backbone", "copy_head", HeadCopy),
    "copy of a query head": (zoo.MaskQueryNet, "backbone", "copy_head", HeadCopy),
    "auto on a CNN": (zoo.convnext, "stages", "auto", ConvDecoder),
    "auto on a ViT": (zoo.vit, "norm", "auto", TokenDecoder),
}


@pytest.fixture(params=CASES)
def case(request):
    make, encoder, decoder, kind = CASES[request.param]
    return settle_norms(make()), encoder, decoder, kind


def test_the_named_decoder_is_built_and_the_model_is_left_as_it_was(case):
    model, encoder, decoder, kind = case
    with left_as_it_was(model):
        assert type(MAEBranch.attach(model, encoder, decoder=decoder).decoder) is kind


def test_all_decoder_parameters_exist_at_attach_and_all_trainable_ones_get_a_gradient(case):
    model, encoder, decoder, _ = case
    branch = MAEBranch.attach(model, encoder, decoder=decoder)
    before = [id(p) for p in branch.parameters()]
    branch.loss(torch.randn(2, 3, 70, 90)).backward()
    assert [id(p) for p in branch.parameters()] == before
    assert {id(p) for p in branch.decoder.parameters()} <= set(before)
    for name, p in branch.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    inside = branch.encoder_parameters()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in inside), name


@pytest.mark.parametrize("size", [(64, 96), (70, 90), (33, 47), (128, 40)])
def test_a_decoder_covers_the_frame_whatever_its_size(case, size):
    model, encoder, decoder, _ = case
    branch = MAEBranch.attach(model, encoder, decoder=decoder)
    out = branch.reconstruct(torch.randn(1, 3, *size))
    assert out.prediction.shape == (1, 3, *size)
    assert out.prediction.isfinite().all()


def test_a_few_steps_lower_the_loss_of_a_fixed_mask(case):
    model, encoder, decoder, _ = case
    branch = MAEBranch.attach(model, encoder, decoder=decoder)
    ramp = torch.linspace(-1, 1, 96).expand(1, 3, 64, 96) + torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1)
    optimizer = torch.optim.Adam([p for p in branch.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        loss = branch.loss(ramp, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---- the parts


def test_the_pyramid_mixes_every_map_and_answers_at_the_finest():
    pyramid = Pyramid([4, 8, 16], 7, 12)
    maps = [torch.randn(2, 4, 16, 20), torch.randn(2, 8, 8, 10), torch.randn(2, 16, 4, 5)]
    plain = pyramid(maps)
    assert plain.shape == (2, 7, 16, 20)
    for i in range(3):
        changed = [m + 1.0 if i == j else m for j, m in enumerate(maps)]
        assert not torch.allclose(pyramid(changed), plain)


def test_the_convolutional_decoder_starts_at_stride_four():
    specs = [MapSpec(i, "nchw", 4 + i, stride) for i, stride in enumerate((1, 2, 4, 8))]
    assert ConvDecoder(specs).stride == 4
    assert len(ConvDecoder(specs).pyramid.lateral) == 2
    assert ConvDecoder(specs[:2]).stride == 2


def test_token_positions_are_those_of_the_formula_and_all_differ():
    table = sincos_positions(3, 5, 16)
    omega = [1 / 10000 ** (i / 4) for i in range(4)]
    for row in range(3):
        for column in range(5):
            expected = [f(v * w) for v in (row, column) for f in (torch.sin, torch.cos) for w in torch.tensor(omega)]
            torch.testing.assert_close(table[5 * row + column], torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert len({row.numpy().tobytes() for row in table}) == 15


def test_the_token_decoder_knows_where_a_token_lies():
    decoder = TokenDecoder([MapSpec(0, "tokens", 8, 16)])
    same = torch.randn(1, 8, 1, 1).expand(1, 8, 2, 3)
    out = decoder(Features([same], same, (32, 48)))
    assert out.shape == (1, 3, 32, 48)
    assert not torch.allclose(out[..., :16, :16], out[..., 16:, 32:])


# ---- copy_head


def test_the_copied_head_keeps_the_trained_weights_and_shares_none_of_them():
    model = settle_norms(zoo.UNet())
    copy = MAEBranch.attach(model, "encoder", decoder="copy_head").decoder
    theirs, mine = dict(model.head.named_parameters()), dict(copy.head.head.named_parameters())
    assert theirs.keys() == mine.keys()
    for name, p in theirs.items():
        assert mine[name].data_ptr() != p.data_ptr()
        if not name.startswith("out."):
            assert torch.equal(mine[name], p), name
    assert mine["out.weight"].shape[0] == 3
    assert not any(name.startswith("encoder.") for name, _ in copy.head.named_parameters())


def test_the_copied_head_runs_what_the_models_own_head_runs():
    model = settle_norms(zoo.UNet())
    copy = MAEBranch.attach(model, "encoder", decoder="copy_head").decoder
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        levels = model.encoder(images)
        copy.eval()
        inside = {}
        for name, net in (("theirs", model), ("mine", copy.head)):
            net.head.up[0].register_forward_hook(lambda _m, _a, out, name=name: inside.setdefault(name, out))
        model(images)
        copy(Features(levels[2:], levels, (32, 48)))
    assert torch.equal(inside["mine"], inside["theirs"])


def test_the_copied_head_ends_in_3_s_s_channels_at_its_stride():
    model = zoo.MaskQueryNet()
    copy = MAEBranch.attach(model, "backbone", decoder="copy_head").decoder
    assert copy.last == "sem_seg_head.mask_features"
    assert copy.stride == 4
    assert copy.head.sem_seg_head.mask_features.out_channels == 48
    unused = [name for name, p in copy.named_parameters() if not p.requires_grad]
    assert unused
    assert all("query" in n or "attend" in n or "norm" in n or "classify" in n or "mask_embed" in n for n in unused)


def test_the_copied_head_depends_on_the_features_and_keeps_none_between_passes():
    model = settle_norms(zoo.UNet())
    copy = MAEBranch.attach(model, "encoder", decoder="copy_head").decoder.eval()
    outs = []
    for _ in range(2):
        levels = model.encoder(torch.randn(1, 3, 32, 48))
        outs.append(copy(Features(levels[2:], levels, (32, 48))))
    assert not torch.allclose(outs[0], outs[1])
    assert copy.head.get_submodule("encoder").output is None


@pytest.mark.parametrize(
    ("make", "encoder", "message"),
    [
        (zoo.resnet, "layer4", "one module: 'conv1' runs before"),
        (zoo.TupleNet, "backbone", "ends in a convolution"),
        (zoo.UNet, "", "the encoder is the whole model"),
        (zoo.UNet, "encoder.down.2", "runs before the module that was named"),
    ],
    ids=["no module of its own", "a linear head", "no head", "skips past the encoder"],
)
def test_a_head_that_cannot_be_copied_is_refused(make, encoder, message):
    model = make()
    with left_as_it_was(model), pytest.raises(EncoderError, match=message):
        MAEBranch.attach(model, encoder, decoder="copy_head")


# ---- the user's own


class Own(nn.Module):
    def __init__(self, specs):
        super().__init__()
        self.spec = specs[-1]
        self.to_pixels = nn.Conv2d(self.spec.channels, 3 * self.spec.stride**2, 1)

    def forward(self, features):
        assert features.image_size[0] >= features.maps[-1].shape[-2]
        return nn.functional.pixel_shuffle(self.to_pixels(features.maps[-1]), self.spec.stride)


@pytest.mark.parametrize("given", ["module", "factory"])
def test_a_decoder_of_the_users_own_may_be_a_module_or_a_factory(given):
    model = zoo.MaskQueryNet()
    decoder = Own([MapSpec(2, "nchw", 24, 16)]) if given == "module" else Own
    branch = MAEBranch.attach(model, "backbone", decoder=decoder)
    assert isinstance(branch.decoder, Own)
    assert {"decoder.to_pixels.weight", "decoder.to_pixels.bias"} < {name for name, _ in branch.named_parameters()}
    branch.loss(torch.randn(1, 3, 40, 56)).backward()
    assert branch.decoder.to_pixels.weight.grad is not None
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_the_decoder_sees_the_encoders_own_output_beside_the_maps():
    model = zoo.MaskQueryNet().eval()
    seen = []

    class Look(Own):
        def forward(self, features):
            seen.append(features)
            return super().forward(features)

    branch = MAEBranch.attach(model, "backbone", decoder=Look)
    images = torch.randn(1, 3, 32, 48)
    branch.reconstruct(images)
    assert list(seen[-1].raw) == ["res2", "res3", "res4"]
    assert seen[-1].image_size == (32, 48)
    assert [m.shape[1:] for m in seen[-1].maps] == [(8, 8, 12), (16, 4, 6), (24, 2, 3)]
    assert run_encoder(model, model.backbone, images).keys() == seen[-1].raw.keys()
