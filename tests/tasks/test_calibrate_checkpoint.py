"""A checkpoint on stills of its own ground: which stills are taken, what is measured on them, and what is written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from arm_inputs import CLASSES, SIZE, checkpoint, write_clip
from conftest import same_bits
from ttt_adapt.data import open_clips, open_frames
from ttt_adapt.errors import CheckpointError, ConfigError, DataError
from ttt_adapt.tasks.calibrate import calibrate_checkpoint, open_stills, spread
from ttt_adapt.tasks.checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_calibration,
    save_checkpoint,
    write_calibration,
)
from ttt_adapt.video import VideoWriter


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of two labelled clips, of 7 and 5 frames."""
    root = tmp_path_factory.mktemp("clips")
    write_clip(root / "one", 7, seed=1)
    write_clip(root / "two", 5, seed=2)
    return root


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder of one labelled clip of 20 frames: enough for a choice."""
    root = tmp_path_factory.mktemp("ground")
    write_clip(root / "long", 20, seed=3)
    return root


@pytest.fixture
def made() -> Checkpoint:
    return checkpoint()


def labelled(made: Checkpoint, clips, **changes):
    return open_stills(made.spec, clips, **{"count": 10, **changes})


def content(file) -> tuple[dict, dict]:
    """Tensors and metadata of a file, which is not written in the same order every time."""
    with safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


# ---- which stills


@pytest.mark.parametrize(("total", "count"), [(9, 3), (377, 40), (12, 12), (5, 40), (41, 40), (0, 4)])
def test_stills_are_evenly_spaced_and_none_comes_twice(total, count):
    places = spread(total, count)
    assert len(places) == min(count, total)
    assert places == sorted(set(places))
    assert all(0 <= place < total for place in places)
    gaps = np.diff(places)
    assert not gaps.size or gaps.max() - gaps.min() <= 1


def test_labelled_clips_give_frames_with_their_labels(made, clips):
    every = [sample for clip in open_clips(clips) for sample in clip]
    found = labelled(made, clips, count=6)
    assert (found.of, found.unlabelled, found.ignore) == (12, "", 255)
    for place, frame, labels in zip(spread(12, 6), found.frames, found.labels, strict=True):
        assert np.array_equal(frame, every[place][0])
        assert np.array_equal(labels, every[place][1])


def test_names_choose_clips_and_a_size_resizes_them(made, clips):
    found = labelled(made, clips, names=["two"], size=(24, 32))
    assert found.of == len(found.frames) == 5
    assert {frame.shape for frame in found.frames} == {(24, 32, 3)}
    assert {labels.shape for labels in found.labels} == {(24, 32)}


def test_labels_can_be_left_out(made, clips):
    found = labelled(made, clips, labels=False)
    assert found.labels is None
    assert len(found.frames) == 10


def test_pictures_and_videos_have_no_labels_and_it_is_said_why(made, clips, tmp_path):
    shutil.copytree(clips / "one" / "images", tmp_path / "pictures")
    found = labelled(made, tmp_path / "pictures")
    assert (found.labels, found.of) == (None, 7)
    assert "expected images/" in found.unlabelled
    with VideoWriter(tmp_path / "film.mp4", 10) as writer:
        for frame in found.frames:
            writer.write(frame)
    film = labelled(made, tmp_path / "film.mp4", count=3)
    assert (film.labels, film.of) == (None, 7)
    (whole,) = open_frames(tmp_path / "film.mp4")
    decoded = [frame for frame, _ in whole]
    for place, frame in zip(spread(7, 3), film.frames, strict=True):
        assert np.array_equal(frame, decoded[place])
    with pytest.raises(DataError, match="expected a folder of clips"):
        labelled(made, tmp_path / "film.mp4", labels=True)


def test_labels_of_other_classes_are_not_used_unless_they_are_asked_for(made, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "other")
    (tmp_path / "other" / "index.json").write_text(json.dumps({"classes": ["road", "cat", "sky"], "ignore": 255}))
    found = labelled(made, tmp_path / "other")
    assert found.labels is None
    assert "of the classes road, cat, sky" in found.unlabelled
    with pytest.raises(DataError, match="road, cat, sky"):
        labelled(made, tmp_path / "other", labels=True)


def test_class_ids_without_names_are_those_of_the_checkpoint(made, clips, tmp_path):
    shutil.copytree(clips / "one", tmp_path / "one")
    assert labelled(made, tmp_path / "one").labels is not None


def test_the_rendered_street_has_labels_for_its_own_classes_only(made):
    from ttt_adapt.data.street import CLASSES as STREET

    own = checkpoint(classes=STREET)
    assert len(open_stills(own.spec, "street", count=8, size=SIZE).labels) == 8
    other = open_stills(made.spec, "street", count=8, size=SIZE)
    assert other.labels is None
    assert len(other.frames) == 8


@pytest.mark.parametrize("count", [0, -3])
def test_a_number_of_stills_below_1_is_refused(count, made, clips):
    with pytest.raises(ConfigError, match=f"stills is {count}"):
        labelled(made, clips, count=count)


def test_a_folder_without_pictures_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="no picture and no video"):
        open_stills(made.spec, tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_stills(made.spec, tmp_path / "nowhere")


# ---- what is measured


def test_calibrating_changes_no_weight_and_gives_branch_and_checkpoint_the_same(made, ground):
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    found = calibrate_checkpoint(made, labelled(made, ground, count=16))
    assert same_bits(before, dict(made.model.state_dict()))
    assert made.calibration is made.branch.calibration is found
    assert (found.stills, found.size, found.record["by"]) == (16, SIZE, "labels")
    found.check(made.model)


def test_the_same_stills_and_seed_give_the_same_calibration_and_others_another(made, ground):
    first, again = (calibrate_checkpoint(made, labelled(made, ground, count=16)) for _ in range(2))
    assert first.digest == again.digest
    assert first.record == again.record
    assert first.record["candidates"]
    assert calibrate_checkpoint(made, labelled(made, ground, count=8)).digest != first.digest


def test_without_labels_the_rule_is_chosen_by_agreement_and_without_a_choice_it_is_the_default(made, ground):
    stills = labelled(made, ground, count=16, labels=False)
    assert calibrate_checkpoint(made, stills).record["by"] == "agreement"
    assert not calibrate_checkpoint(made, stills, choose=False).record


def test_a_model_without_a_branch_is_calibrated_too(clips):
    bare = checkpoint(branch=None)
    assert calibrate_checkpoint(bare, labelled(bare, clips), choose=False).loss is None
    assert bare.calibration is not None


def test_steps_choose_settings_too_and_they_are_written(made, ground, tmp_path):
    found = calibrate_checkpoint(made, labelled(made, ground, count=16), steps=True, drifts=["night"])
    tried = [row["settings"] for row in found.record["settings"]]
    assert found.settings in tried
    assert "settings" not in calibrate_checkpoint(made, labelled(made, ground, count=16), drifts=["night"]).record
    made.branch.calibration = found
    save_checkpoint(tmp_path / "a.safetensors", made)  # the branch's is the one that counts
    assert made.calibration is not found
    assert load_checkpoint(tmp_path / "a.safetensors").calibration.settings == found.settings


def test_steps_of_a_checkpoint_without_a_branch_are_refused(clips):
    bare = checkpoint(branch=None)
    with pytest.raises(ConfigError, match="this checkpoint has no MAE branch: leave it out, or train the model"):
        calibrate_checkpoint(bare, labelled(bare, clips), steps=True)
    assert bare.calibration is None


@pytest.mark.parametrize("mode", ["regression", "classification"])
def test_colorization_is_calibrated_on_the_grey_of_frames_that_drift_in_colour(mode, ground, monkeypatch):
    made = checkpoint(task="colorization", classes=(), task_options={"mode": mode}, branch=None)
    found = open_stills(made.spec, ground, count=16)
    assert found.labels is None
    assert np.ptp(np.stack(found.frames).astype(int), axis=-1).max() > 0  # in colour
    shown = []
    made.model.register_forward_pre_hook(lambda _module, inputs: shown.append(inputs[0]))
    result = calibrate_checkpoint(made, found, drifts=["white-balance"])
    assert result.record["by"] == "agreement"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.spec.mean, made.spec.std))
    pictures = torch.cat([x for x in shown if x.shape[-2:] == SIZE]) * std + mean
    assert float((pictures.amax(1) - pictures.amin(1)).max()) < 1e-3
    with pytest.raises(ConfigError, match="colorization has none"):
        open_stills(made.spec, ground, labels=True)


def test_too_few_stills_and_misspelt_drifts_change_nothing(made, clips):
    kept = calibrate_checkpoint(made, labelled(made, clips), choose=False)
    with pytest.raises(ConfigError, match="got 5 stills; expected at least 8"):
        calibrate_checkpoint(made, labelled(made, clips, names=["two"]))
    with pytest.raises(ConfigError, match="nearest: 'night'"):
        calibrate_checkpoint(made, labelled(made, clips), drifts=["nigth"])
    assert made.calibration is made.branch.calibration is kept


def test_stills_of_several_sizes_are_refused(made, clips, tmp_path):
    shutil.copytree(clips / "one" / "images", tmp_path / "pictures")
    shutil.copytree(clips / "two" / "images", tmp_path / "pictures" / "more")
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "9.png")
    with pytest.raises(ValueError, match="pass stills of the size of the stream"):
        calibrate_checkpoint(made, open_stills(made.spec, tmp_path / "pictures"), choose=False)
    resized = open_stills(made.spec, tmp_path / "pictures", size=SIZE)
    assert calibrate_checkpoint(made, resized, choose=False).stills == 13


# ---- what is written


@pytest.mark.parametrize("half", [False, True])
def test_a_calibration_is_written_into_a_file_whose_weights_stay_bit_for_bit(half, made, clips, tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(file, made, half)
    before, (weights, described) = file.read_bytes(), content(file)
    loaded = load_checkpoint(file)
    found = calibrate_checkpoint(loaded, labelled(made, clips), choose=False)
    write_calibration(file, found, other)
    assert file.read_bytes() == before
    for _ in range(2):  # the second replaces the first
        write_calibration(file, found)
        tensors, metadata = content(file)
        assert same_bits(tensors, content(other)[0])
        assert same_bits(weights, {name: v for name, v in tensors.items() if not name.startswith("calibration.")})
        assert metadata == {**described, "calibration": found.to_json()} == content(other)[1]
    assert read_calibration(file).digest == load_checkpoint(file).calibration.digest == found.digest
    load_checkpoint(file).calibration.check(load_checkpoint(file).model)


def test_a_checkpoint_without_a_calibration_has_none(made, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", made)
    assert read_calibration(tmp_path / "a.safetensors") is None


def test_a_file_survives_a_calibration_that_cannot_be_written(made, clips, tmp_path, monkeypatch):
    import ttt_adapt.files as files

    file = tmp_path / "a.safetensors"
    save_checkpoint(file, made)
    before = file.read_bytes()
    found = calibrate_checkpoint(made, labelled(made, clips), choose=False)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CheckpointError, match="no space left"):
        write_calibration(file, found)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_classes_of_these_tests_are_those_of_their_clips(clips):
    assert open_clips(clips)[0].classes == CLASSES
