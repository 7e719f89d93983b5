"""Checkpoints: what is saved comes back, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from conftest import photograph, same_bits, settle_norms
from ttt_adapt.errors import CheckpointError, ConfigError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.measure import measure, take_stills
from ttt_adapt.tasks.checkpoint import (
    Checkpoint,
    build_model,
    check_can_be_saved,
    load_checkpoint,
    load_initial,
    save_checkpoint,
)
from ttt_adapt.tasks.spec import ModelSpec

CNN = {"encoder": "resnet18", "encoder_options": {"channels": (8, 16, 24, 32)}, "width": 16}
VIT = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_options": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "width": 16,
}
IMAGES = (2, 3, 50, 70)


def make(kind=CNN, **changes) -> Checkpoint:
    spec = ModelSpec(
        **{"classes": ("road", "car", "sky"), "size": (48, 64), "branch": {"mask_ratio": 0.7}, **kind, **changes}
    )
    model, branch = build_model(spec)
    settle_norms(model)
    for parameter in branch.parameters() if branch is not None else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Checkpoint(model.eval(), branch, spec)


def outputs(checkpoint: Checkpoint):
    images = torch.randn(IMAGES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = checkpoint.model(images)
    if checkpoint.branch is None:
        return [logits]
    seen = checkpoint.branch.reconstruct(images, generator=torch.Generator().manual_seed(4))
    return [logits, seen.prediction, seen.mask, seen.loss]


@pytest.mark.parametrize(
    "kind",
    [
        CNN,
        VIT,
        {**CNN, "branch": {"decoder": "copy_head", "loss_on": "all", "image_size": (96, 128)}},
        {**CNN, "branch": None},
        {**VIT, "branch": {"masking": "pixels", "norm_pix_loss": True}},
    ],
    ids=["cnn", "vit", "copy_head", "main only", "vit with pixels"],
)
def test_a_saved_checkpoint_comes_back_bit_for_bit_in_eval_mode(tmp_path, kind):
    saved = make(kind)
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert same_bits(outputs(loaded), outputs(saved))
    assert same_bits(dict(loaded.model.state_dict()), dict(saved.model.state_dict()))
    assert not loaded.model.training
    assert loaded.branch is None or not loaded.branch.training
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_description_comes_back_with_its_types(tmp_path):
    saved = make(palette=((1, 2, 3), (4, 5, 6), (7, 8, 9)), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    saved.spec.training.append({"stage": "joint", "epochs": 3})
    save_checkpoint(tmp_path / "a.safetensors", saved)
    spec = load_checkpoint(tmp_path / "a.safetensors").spec
    assert spec.palette == saved.spec.palette
    assert (spec.classes, spec.size, spec.mean, spec.std) == (
        ("road", "car", "sky"),
        (48, 64),
        *(saved.spec.mean, saved.spec.std),
    )
    assert spec.training == [{"stage": "joint", "epochs": 3}]
    normalize = spec.preprocess()
    assert (normalize.mean, normalize.std) == (saved.spec.mean, saved.spec.std)


def test_half_precision_takes_half_the_room_and_loads_as_fp32(tmp_path):
    saved = make(VIT)
    save_checkpoint(tmp_path / "full.safetensors", saved)
    save_checkpoint(tmp_path / "half.safetensors", saved, half=True)
    full, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.55 * full
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    assert all(p.dtype is torch.float32 for p in loaded.model.parameters())
    torch.testing.assert_close(outputs(loaded)[0], outputs(saved)[0], atol=0.02, rtol=0.02)


def test_saving_changes_neither_model_nor_branch(tmp_path):
    saved = make()
    before, weights = photograph(saved.model), {k: v.clone() for k, v in saved.branch.state_dict().items()}
    save_checkpoint(tmp_path / "deep" / "er" / "a.safetensors", saved, half=True)
    assert photograph(saved.model) == before
    assert same_bits(weights, dict(saved.branch.state_dict()))


# ---- formats


def write_without_format(path: Path, checkpoint: Checkpoint) -> None:
    """A file as it was written before checkpoints had a format number: byte for byte the same layout."""
    from safetensors.torch import save_file

    weights = {f"model.{name}": value for name, value in checkpoint.model.state_dict().items()}
    if checkpoint.branch is not None:
        weights |= {f"branch.{name}": value for name, value in checkpoint.branch.state_dict().items()}
    fields = {
        "encoder": checkpoint.spec.encoder,
        "classes": checkpoint.spec.classes,
        "size": checkpoint.spec.size,
        "encoder_options": checkpoint.spec.encoder_options,
        "branch": checkpoint.spec.branch,
        "objective": checkpoint.spec.objective,
        "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "width": checkpoint.spec.width,
        "training": [{"stage": "joint", "epochs": 3}],
        "task": "segmentation",
        "task_options": {},
    }
    save_file({name: value.contiguous() for name, value in weights.items()}, path, {"spec": json.dumps(fields)})


@pytest.mark.parametrize("kind", [CNN, VIT, {**CNN, "branch": None}], ids=["cnn", "vit", "main only"])
def test_a_file_from_before_formats_had_numbers_loads_to_the_same_bits(tmp_path, kind):
    saved = make(kind)
    write_without_format(tmp_path / "old.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "old.safetensors")
    assert same_bits(outputs(loaded), outputs(saved))
    assert same_bits(dict(loaded.model.state_dict()), dict(saved.model.state_dict()))
    assert loaded.spec.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert (loaded.spec.mean, loaded.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.spec.training == [{"stage": "joint", "epochs": 3}]


def rewritten(path: Path, **metadata: str) -> Path:
    """The checkpoint at `path` again under another name, with other metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        known, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, path.with_name("rewritten.safetensors"), {**known, **metadata})
    return path.with_name("rewritten.safetensors")


def test_a_checkpoint_carries_its_format_and_a_newer_one_is_refused_before_anything_else_is_read(tmp_path):
    from safetensors import safe_open

    save_checkpoint(tmp_path / "a.safetensors", make())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "1"
    newer = rewritten(tmp_path / "a.safetensors", format="2", spec='{"of": "tomorrow"}')
    with pytest.raises(CheckpointError, match=r"rewritten\.safetensors has format 2, .* up to 1: update ttt_adapt"):
        load_checkpoint(newer)
    with pytest.raises(CheckpointError, match="no checkpoint written by ttt_adapt"):
        load_checkpoint(rewritten(tmp_path / "a.safetensors", format="pt"))


def bad_files(folder: Path) -> dict[str, Path]:
    from safetensors.torch import save_file

    good = folder / "good.safetensors"
    save_checkpoint(good, make())
    data = good.read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    torch.save({"a": torch.zeros(2)}, folder / "pickle.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "no_spec.safetensors", {"spec": json.dumps({"encoder": "resnet18"})})
    (folder / "folder.safetensors").mkdir()
    return {path.stem: path for path in folder.iterdir() if path != good} | {"missing": folder / "none.safetensors"}


def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path):
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)
        assert name


def test_weights_that_do_not_fit_their_description_are_named(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_checkpoint(tmp_path / "a.safetensors", make())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights.pop("model.head.out.bias")
    weights["branch.decoder.pyramid.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"missing \(1\): head.out.bias"):
        load_checkpoint(tmp_path / "b.safetensors")


def test_starting_from_another_model_names_the_keys_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", make(classes=("road", "car")))
    other = make()
    before = photograph(other.model)
    with pytest.raises(CheckpointError, match=r"other shapes \(2\): head.out.weight: \(2, .*expected \(3, "):
        load_initial(tmp_path / "a.safetensors", other)
    assert photograph(other.model) == before
    save_checkpoint(tmp_path / "v.safetensors", make(VIT))
    with pytest.raises(CheckpointError, match="backbone"):
        load_initial(tmp_path / "v.safetensors", other)
    assert photograph(other.model) == before


@pytest.mark.parametrize("with_branch", [True, False])
def test_starting_from_a_file_takes_its_model_and_its_branch_if_it_has_one(tmp_path, with_branch):
    source, target = make(branch={} if with_branch else None), make(branch={})
    own = {k: v.clone() for k, v in target.branch.state_dict().items()}
    save_checkpoint(tmp_path / "a.safetensors", source)
    load_initial(tmp_path / "a.safetensors", target)
    assert same_bits(dict(target.model.state_dict()), dict(source.model.state_dict()))
    expected = dict(source.branch.state_dict()) if with_branch else own
    assert same_bits(dict(target.branch.state_dict()), expected)


def test_an_existing_file_survives_a_save_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make())
    whole = path.read_bytes()

    def fill_the_disk(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(path, make())
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "a.safetensors", make())


def test_an_unknown_encoder_in_a_file_is_named(tmp_path):
    saved = make()
    spec = ModelSpec("resnet18_of_tomorrow", saved.spec.classes, saved.spec.size)
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(saved.model, saved.branch, spec))
    with pytest.raises(ConfigError, match="resnet18_of_tomorrow"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_a_checkpoint_with_a_calibration_of_an_earlier_version_is_used_without_it(tmp_path):
    saved = make({**CNN, "branch": None})
    stills = [torch.randn(3, 48, 64) for _ in range(8)]
    found = measure(saved.model, take_stills(saved.model, stills))
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, dataclasses.replace(saved, calibration=found))
    assert load_checkpoint(path).calibration is not None
    text = json.loads(found.to_json())
    path = rewritten(path, calibration=json.dumps({**text, "format": 1}))
    with pytest.warns(UserWarning, match="earlier version.*used without it: `ttt-adapt calibrate` makes one that fits"):
        loaded = load_checkpoint(path)
    assert loaded.calibration is None
    assert same_bits(outputs(loaded), outputs(saved))
    with pytest.raises(CheckpointError, match="earlier version.*calibrate the model again"):
        Calibration.of_tensors(found.tensors(), json.dumps({**text, "format": 1}))


# ---- layers that share weights, and what no file can hold


def test_layers_that_share_weights_are_saved_and_give_the_same_outputs(tmp_path):
    saved = make()
    block = saved.model.backbone.layer1[1]
    block.conv2.weight = block.conv1.weight
    save_checkpoint(tmp_path / "a.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert same_bits(outputs(loaded), outputs(saved))
    assert same_bits(dict(loaded.model.state_dict()), dict(saved.model.state_dict()))


def test_a_state_that_no_file_can_hold_is_refused_by_name_before_anything_is_written(tmp_path):
    saved = make()
    saved.model.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match=r"model\.odd is a tensor \(3, 3\).*ordinary tensors"):
        check_can_be_saved(saved)
    with pytest.raises(CheckpointError, match=r"model\.odd"):
        save_checkpoint(tmp_path / "a.safetensors", saved)
    assert not [*tmp_path.iterdir()]


def test_starting_from_a_file_with_a_damaged_branch_changes_nothing(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_checkpoint(tmp_path / "a.safetensors", make())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights["branch.mask_channel.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "b.safetensors", metadata)
    target = make()
    before = photograph(target.model)
    with pytest.raises(CheckpointError, match="other shapes"):
        load_initial(tmp_path / "b.safetensors", target)
    assert photograph(target.model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10**4}, "width has 10000; with the weights in this file it is at most"),
        ({"width": "16"}, "has '16' as width; expected a whole number"),
        ({"size": [48]}, "as size; expected a list of 2 values"),
        ({"classes": "road"}, "has 'road' as classes; expected a list"),
        ({"more": 1}, "has 'more', which this version of ttt_adapt does not know"),
        ({"encoder_options": {"channels": [8, 16, 24, 10**9]}}, "encoder_options has 1000000000"),
        ({"encoder_options": {"pretrained": True}}, "has pretrained among the options of its encoder"),
        ({"branch": {"masks": 1}}, "has 'masks' among the settings of its branch"),
        ({"branch": {"patch_size": 10**5}}, "patch_size has 100000"),
        ({"palette": [[1, 2, 3]]}, "has 1 colours for 3 classes"),
        ({"std": [0.1, 0.0, 0.1]}, "as std; expected a list"),
        ({"objective": "sleep"}, "has the objective 'sleep'; expected mae, rotation"),
    ],
)
def test_a_description_that_cannot_be_is_refused_before_a_model_is_built(tmp_path, changes, message):
    save_checkpoint(tmp_path / "a.safetensors", make())
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        spec = json.loads(file.metadata()["spec"])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(rewritten(tmp_path / "a.safetensors", spec=json.dumps({**spec, **changes})))
