"""Heads of all kinds are copied as decoders: what they read of their encoder, what they return, how they are built."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import Features

SIZE = (32, 48)


class Encoder(nn.Module):
    """Maps at strides 4 and 8, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)
        self.channels, self.settings = (8, 12), {"levels": 2}

    @property
    def strides(self) -> tuple[int, int]:
        return self.stem.stride[0], self.stem.stride[0] * self.down.stride[0]

    def both(self, x):
        return self(x)[::-1]

    def forward(self, x):
        fine = self.stem(x).relu()
        return [fine, self.down(fine)]


class Net(nn.Module):
    """An encoder and a head that ends in a convolution at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.mix, self.classify = nn.Conv2d(20, 16, 1), nn.Conv2d(16, 5, 1)

    def features(self, x):
        return self.encoder(x)

    def forward(self, x):
        fine, coarse = self.features(x)
        return self.classify(self.mix(torch.cat([fine, F.interpolate(coarse, size=fine.shape[-2:])], 1)).relu())


class ReadsSettings(Net):
    def features(self, x):
        assert self.encoder.channels == (8, 12)
        assert self.encoder.settings["levels"] == 2
        assert self.encoder.strides == (4, 8)
        assert self.encoder.down.out_channels == 12
        assert next(self.encoder.stem.parameters()).dtype is x.dtype
        assert not hasattr(self.encoder, "stranger")
        return self.encoder(x)


class CallsAMethod(Net):
    def features(self, x):
        coarse, fine = self.encoder.both(x)
        return fine, coarse


class EmptiesTheList(Net):
    def features(self, x):
        levels = self.encoder(x)
        coarse = levels.pop()
        return levels.pop(), coarse


class WithAuxiliary(Net):
    """Its auxiliary head runs last."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.aux = kind, nn.Conv2d(8, 5, 1)

    def forward(self, x):
        main, aux = super().forward(x), self.aux(self.encoder(x)[0])
        if self.kind == "unused":
            return main
        scores = main.flatten(2).transpose(1, 2)
        return {"dict": {"out": main, "aux": aux}, "list": [aux, main], "beside": (scores, main, aux)}[self.kind]


class OneHeadForAllLevels(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(8, 16, 1), nn.Conv2d(12, 16, 1)])

    def forward(self, x):
        return [self.classify(lateral(level)) for lateral, level in zip(self.lateral, self.encoder(x), strict=True)]


class Labels(Net):
    def forward(self, x):
        return super().forward(x).argmax(1)


HEADS = {
    "plain": Net,
    "settings": ReadsSettings,
    "a method": CallsAMethod,
    "a list that it empties": EmptiesTheList,
    "an auxiliary head": lambda: WithAuxiliary("unused"),
    "a dict of main and auxiliary": lambda: WithAuxiliary("dict"),
    "a list of auxiliary and main": lambda: WithAuxiliary("list"),
    "scores beside the map": lambda: WithAuxiliary("beside"),
    "one head for all levels": OneHeadForAllLevels,
    "labels": Labels,
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_this_kind_is_copied_up_to_its_main_output(kind):
    torch.manual_seed(0)
    model = HEADS[kind]().eval()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, "encoder", decoder="copy_head", image_size=SIZE)
    decoder = branch.decoder
    assert (decoder.last, decoder.stride) == ("classify", 4)
    assert decoder.head.classify.out_channels == 48
    assert not any(name.startswith("encoder.") for name in decoder.head.state_dict())
    images = torch.randn(2, 3, *SIZE)
    for _ in range(2):
        branch.loss(images).backward()
    assert all(p.grad is not None for p in decoder.parameters() if p.requires_grad)
    assert branch.reconstruct(torch.randn(1, 3, 30, 44)).prediction.shape == (1, 3, 30, 44)


def test_the_copy_predicts_what_the_head_makes_of_the_features():
    torch.manual_seed(0)
    model = EmptiesTheList().eval()
    decoder = MAEBranch.attach(model, "encoder", decoder="copy_head", image_size=SIZE).decoder
    seen = {}
    decoder.head.mix.register_forward_hook(lambda _m, _args, out: seen.update(mine=out))
    model.mix.register_forward_hook(lambda _m, _args, out: seen.update(theirs=out))
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        model(images)
        levels = model.encoder(images)
        decoder(Features(levels, levels, SIZE))
    assert torch.equal(seen["mine"], seen["theirs"])
    assert len(levels) == 2


def test_a_branch_with_a_copied_head_can_be_copied_and_pickled():
    model = ReadsSettings().eval()
    branch = MAEBranch.attach(model, "encoder", decoder="copy_head", image_size=SIZE)
    images = torch.randn(1, 3, *SIZE)
    expected = branch.loss(images, generator=torch.Generator().manual_seed(0))
    decoder = branch.decoder
    for other in (copy.deepcopy(branch).decoder, pickle.loads(pickle.dumps(decoder))):
        branch.decoder = other
        assert torch.equal(branch.loss(images, generator=torch.Generator().manual_seed(0)), expected)


def test_the_stride_of_a_copied_head_is_that_of_its_maps_where_the_model_pads():
    class Padding(Net):
        def features(self, x):
            return self.encoder(F.pad(x, (0, -x.shape[3] % 64, 0, -x.shape[2] % 64)))

    model = Padding().eval()
    branch = MAEBranch.attach(model, "encoder", decoder="copy_head", image_size=(64, 64))
    assert branch.decoder.stride == 4
    assert branch.reconstruct(torch.randn(1, 3, *SIZE)).prediction.shape == (1, 3, *SIZE)


class RunsAPartOfTheEncoder(Net):
    def features(self, x):
        fine, coarse = self.encoder(x)
        return fine + self.encoder.stem(x), coarse


class NeedsMore(Net):
    def features(self, x):
        self.notes.clear()
        levels = self.encoder(x)
        return (*levels[:1], self.notes["coarse"])

    def __init__(self) -> None:
        super().__init__()
        self.notes = {}
        self.encoder.down.register_forward_hook(lambda _m, _args, out: self.notes.update(coarse=out))


@pytest.mark.parametrize(
    ("make", "message"),
    [(RunsAPartOfTheEncoder, "it runs 'stem' of the encoder"), (NeedsMore, "it fails with KeyError: 'coarse'")],
)
def test_a_head_that_needs_more_than_the_encoders_output_is_refused_with_the_reason(make, message):
    model = make().eval()
    with pytest.raises(EncoderError, match=f'{message}.*decoder="conv"'):
        MAEBranch.attach(model, "encoder", decoder="copy_head", image_size=SIZE)


# ---- Hugging Face


def _upernet():
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=stages)
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 16, "pool_scales": [1, 2], "num_labels": 5}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))


VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}


def _dpt(name: str):
    import transformers

    sizes = {"image_size": 64, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3], "num_labels": 5}
    return getattr(transformers, name)(transformers.DPTConfig(**VIT, **NECK, **sizes, is_hybrid=False))


def _depth_anything():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    sizes = {"image_size": 64, "patch_size": 16, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    sizes = {**NECK, "backbone_config": Dinov2Config(**VIT, **sizes), "patch_size": 16, "reassemble_hidden_size": 16}
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(**sizes, head_hidden_size=8))


@pytest.mark.parametrize(
    ("make", "encoder", "last", "stride"),
    [
        (_upernet, "backbone", "decode_head.classifier", 4),
        (lambda: _dpt("DPTForSemanticSegmentation"), "dpt", "head.head.4", 2),
        (lambda: _dpt("DPTForDepthEstimation"), "dpt", "head.head.4", 1),
        (_depth_anything, "backbone", "head.conv3", 1),
    ],
    ids=["UPerNet", "DPT segmentation", "DPT depth", "Depth Anything"],
)
def test_heads_of_transformers_are_copied(make, encoder, last, stride):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'ttt-adapt[test]'")
    model = make().eval()
    model(torch.randn(1, 3, 64, 64))  # it sets hooks of its own in its first pass
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, encoder, decoder="copy_head", image_size=64)
    assert (branch.decoder.last, branch.decoder.stride) == (last, stride)
    branch.loss(torch.randn(1, 3, 64, 64)).backward()
    assert all(p.grad is not None for p in branch.decoder.parameters() if p.requires_grad)
