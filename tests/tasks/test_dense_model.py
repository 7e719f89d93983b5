"""DenseModel: timm encoders of every family, any image size, and clear errors."""

from __future__ import annotations

import pytest
import torch

from conftest import photograph
from ttt_adapt import MAEBranch
from ttt_adapt.errors import ConfigError
from ttt_adapt.tasks.dense_model import DenseModel
from ttt_adapt.tasks.pretrained import find_pretrained

TRANSFORMER = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (2, 2, 4, 4)}
ENCODERS = {
    "resnet18": {"channels": (8, 16, 24, 32)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "mobilevit_xxs": {},  # a hybrid with strides, though "vit" is in its name
    "swin_tiny_patch4_window7_224": SWIN,  # channels-last maps
    "vit_tiny_patch16_224": TRANSFORMER,
    "vit_base_patch16_reg4_gap_256": TRANSFORMER,
    "deit_tiny_patch16_224": TRANSFORMER,
    "eva02_tiny_patch14_224": TRANSFORMER,
}
MASKING = {name: "tokens" if "patch" in name and "swin" not in name else "pixels" for name in ENCODERS}


def build(name: str, classes: int = 5) -> DenseModel:
    return DenseModel(name, classes, width=16, encoder_options=ENCODERS[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_have_the_size_of_the_image_for_any_height_and_width(name):
    model = build(name).eval()
    for size in ((64, 96), (70, 101), (31, 17)):
        with torch.no_grad():
            logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5, *size)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_branch_attaches_to_the_backbone_without_a_trace_and_learns(name):
    model = build(name).eval()
    before = photograph(model)
    branch = MAEBranch.attach(model, "backbone")
    assert photograph(model) == before
    assert branch.masking == MASKING[name]
    loss = branch.loss(torch.randn(2, 3, 70, 101))
    loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert trained
    assert all(n.startswith("backbone") for n in trained)


def test_padding_stays_out_of_sight():
    """What lies beyond the frame is cut off again: a frame that needs no padding is not changed by the detour."""
    model = build("convnext_atto").eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image), model(image.clone()))
        assert model(image[..., :63, :95]).shape == (1, 5, 63, 95)


def test_gradients_reach_every_part_of_the_head():
    model = build("resnet18")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_an_unknown_encoder_comes_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"no model 'resnet_18'.*nearest: .*'resnet18'"):
        DenseModel("resnet_18", 5)


@pytest.mark.parametrize(("name", "options"), [("resnet18", {"depht": 3}), ("vit_tiny_patch16_224", {"foo": 1})])
def test_an_unknown_option_of_the_encoder_is_named(name, options):
    with pytest.raises(ConfigError, match=f"cannot make '{name}'.*{next(iter(options))}"):
        DenseModel(name, 5, encoder_options=options)


def test_weights_that_cannot_be_downloaded_are_not_called_a_fault_of_the_options(monkeypatch):
    import timm

    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to the hub")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match="cannot load the pretrained weights of 'resnet18'.*no route to the hub"):
        DenseModel("resnet18", 3, pretrained=find_pretrained("timm", "resnet18"))
    with pytest.raises(ConfigError, match="cannot make 'resnet18' .*depths"):
        DenseModel("resnet18", 3, pretrained=find_pretrained("timm", "resnet18"), encoder_options={"depths": (1,)})
