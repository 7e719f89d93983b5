"""What training starts from: pretrained weights with their colours, a checkpoint with its own, or random weights."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

from conftest import same_bits
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.tasks.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from ttt_adapt.tasks.pretrained import IMAGENET
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CNN = {"channels": (8, 16, 24, 32)}
HALF = (0.5, 0.5, 0.5)
OPTIONS = {"vit_tiny_patch16_224": VIT, "resnet18": CNN}


def trained(out, encoder="vit_tiny_patch16_224", **changes) -> Checkpoint:
    """A checkpoint of a training that is so short and slow that the weights stay where they start."""
    keywords = {
        "encoder_options": OPTIONS[encoder],
        "size": (64, 96),
        "stills": 2,
        "first_epochs": 0,
        "config": TrainConfig(epochs=1, batch_size=2, lr=1e-12, weight_decay=0.0),
    }
    return train("street", out, encoder=encoder, **{**keywords, **changes})


@pytest.fixture
def weights(tmp_path):
    """A file with weights of timm's whole model; returns the file and the model."""
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model


def test_training_starts_from_the_file_and_the_checkpoint_says_so(weights, tmp_path):
    file, model = weights
    trained(tmp_path / "a.safetensors", pretrained=file)
    made = load_checkpoint(tmp_path / "a.safetensors")
    expected = model.state_dict()["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(made.model.state_dict()["backbone.model.blocks.1.mlp.fc1.weight"], expected)
    (stage,) = made.spec.training
    assert stage["pretrained"].startswith("weights.pth (SHA-256 ")


def test_a_pretrained_encoder_brings_its_mean_and_std_and_a_random_one_has_the_default(weights, tmp_path):
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (config.mean, config.std) == (HALF, HALF)
    with_file = trained(tmp_path / "a.safetensors", pretrained=weights[0]).spec
    without = trained(tmp_path / "b.safetensors").spec
    assert (with_file.mean, with_file.std) == (HALF, HALF)
    assert (without.mean, without.std) == IMAGENET
    normalize = load_checkpoint(tmp_path / "a.safetensors").spec.preprocess()
    assert (normalize.mean, normalize.std) == (HALF, HALF)
    assert "pretrained" not in without.training[0]


def test_training_shows_the_model_images_in_the_colours_of_its_weights(weights, tmp_path, monkeypatch):
    import ttt_adapt.training.recipe as recipe

    seen = {}

    def look(model, branch, data, *_args, **_keywords):
        seen[len(seen)] = data[0][0]

    monkeypatch.setattr(recipe, "fit", look)
    plain = trained(tmp_path / "a.safetensors").spec
    trained(tmp_path / "b.safetensors", pretrained=weights[0])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plain.mean, plain.std))
    torch.testing.assert_close(seen[1], (seen[0] * std + mean - 0.5) / 0.5)


def test_a_checkpoint_to_start_from_brings_its_mean_and_std(weights, tmp_path):
    first = trained(tmp_path / "a.safetensors", pretrained=weights[0], recipe="main")
    second = trained(tmp_path / "b.safetensors", init=tmp_path / "a.safetensors")
    assert (second.spec.mean, second.spec.std) == (first.spec.mean, first.spec.std) == (HALF, HALF)
    expected = first.model.state_dict()["head.out.weight"]
    torch.testing.assert_close(second.model.state_dict()["head.out.weight"], expected)


def test_pretrained_weights_change_no_other_weight_of_the_start(weights, tmp_path, monkeypatch):
    import ttt_adapt.training.recipe as recipe

    monkeypatch.setattr(recipe, "fit", lambda *_args, **_keywords: None)
    plain, loaded = (
        trained(tmp_path / f"{i}.safetensors", pretrained=given) for i, given in enumerate((None, weights[0]))
    )
    assert same_bits(dict(plain.model.head.state_dict()), dict(loaded.model.head.state_dict()))
    assert same_bits(dict(plain.branch.state_dict()), dict(loaded.branch.state_dict()))


def test_a_checkpoint_and_pretrained_weights_together_are_refused(weights, tmp_path):
    with pytest.raises(ConfigError, match="give one of the two"):
        trained(tmp_path / "a.safetensors", pretrained=weights[0], init=tmp_path / "none.safetensors")


def test_an_interrupted_run_does_not_go_on_from_other_pretrained_weights(weights, tmp_path, monkeypatch):
    import ttt_adapt.training.recipe as recipe

    file, out = weights[0], tmp_path / "m.safetensors"

    def stop(*_args, **_keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(out, pretrained=file)
    elsewhere = tmp_path / "elsewhere" / file.name
    elsewhere.parent.mkdir()
    torch.save({name: value + 1 for name, value in torch.load(file, weights_only=True).items()}, elsewhere)
    for given in (elsewhere, None):
        with pytest.raises(CheckpointError, match="pretrained=weights.pth"):
            trained(out, pretrained=given, resume=True)
    trained(out, pretrained=file.rename(elsewhere), resume=True)  # the same weights in another folder
    assert out.exists()


def test_pretrained_weights_that_do_not_fit_are_refused_before_anything_is_written(weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"weights\.pth .* resnet18 needs"):
        trained(tmp_path / "new" / "a.safetensors", "resnet18", pretrained=weights[0])
    assert not (tmp_path / "new").exists()


# ---- the patch size of the branch


@pytest.mark.parametrize(
    ("encoder", "branch", "side"),
    [
        ("resnet18", {}, 4),
        ("resnet18", {"mask_ratio": 0.5}, 4),
        ("resnet18", {"patch_size": 16}, 16),
        ("vit_tiny_patch16_224", {}, 16),  # token masking hides whole tokens
        ("vit_tiny_patch16_224", {"masking": "pixels"}, 4),
    ],
)
def test_the_mask_patch_fits_frame_and_encoder_unless_it_is_given(encoder, branch, side, tmp_path, capfd):
    trained(tmp_path / "a.safetensors", encoder, branch=branch)
    made = load_checkpoint(tmp_path / "a.safetensors")
    assert made.branch.patch_size == made.spec.branch["patch_size"] == side
    told = capfd.readouterr().err.count(f"mask patches of {side} x {side} pixels")
    assert told == ("patch_size" not in branch)
    assert {name: made.spec.branch[name] for name in branch} == branch


def test_a_branch_that_was_trained_goes_on_with_its_own_mask_patch(tmp_path):
    spec = ModelSpec("resnet18", (), (64, 96), CNN, branch={})
    street = trained(tmp_path / "a.safetensors", "resnet18", recipe="main").spec
    for name, branch, side in (("default", {}, 16), ("own", {"patch_size": 8}, 8)):
        start = dataclasses.replace(spec, classes=street.classes, branch=branch)
        save_checkpoint(tmp_path / f"{name}.safetensors", Checkpoint(*build_model(start), start))
        made = trained(tmp_path / f"{name}-2.safetensors", "resnet18", init=tmp_path / f"{name}.safetensors")
        assert made.mae_branch.patch_size == side


def test_a_model_for_the_main_task_alone_gets_no_mask_patch(tmp_path, capfd):
    assert trained(tmp_path / "a.safetensors", recipe="main").spec.branch is None
    assert "mask patches" not in capfd.readouterr().err


def test_attach_itself_keeps_the_patch_of_16(tmp_path):
    _, branch = build_model(ModelSpec("resnet18", ("road", "car"), (64, 96), CNN, branch={}))
    assert branch.patch_size == 16
