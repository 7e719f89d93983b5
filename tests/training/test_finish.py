"""The end of a training: weights are rounded as they are stored, and the model is calibrated on its own stills."""

from __future__ import annotations

import pytest
import torch

import ttt_adapt.training.recipe as recipe
from conftest import same_bits
from ttt_adapt.data.street import street_stills
from ttt_adapt.tasks import Stills
from ttt_adapt.tasks.calibrate import calibrate_checkpoint, training_stills
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train

SIZE = (64, 96)


def trained(out, **changes) -> Checkpoint:
    """A tiny CNN after one short epoch on sixteen rendered stills."""
    keywords = {
        "encoder": "resnet18",
        "encoder_options": {"channels": (8, 16, 24, 32)},
        "size": SIZE,
        "stills": 16,
        "first_epochs": 0,
        "config": TrainConfig(epochs=1, batch_size=5, seed=3),
    }
    return train("street", out, **{**keywords, **changes})


def test_training_ends_with_a_calibration_by_labels_on_its_own_stills(tmp_path, capfd):
    out = tmp_path / "m.safetensors"
    returned = trained(out)
    made = load_checkpoint(out)
    assert made.calibration.digest == returned.calibration.digest
    assert (made.calibration.stills, made.calibration.size) == (16, SIZE)
    assert made.calibration.record["by"] == "labels"
    assert made.branch.calibration is made.calibration
    made.calibration.check(made.model)
    assert "calibrated on 16 of 16 training stills: " in capfd.readouterr().err


def test_calibration_changes_no_weight_and_can_be_left_out(tmp_path, capfd):
    plain = trained(tmp_path / "a.safetensors", calibrate=False)
    assert plain.calibration is None
    assert "calibrated" not in capfd.readouterr().err
    calibrated = trained(tmp_path / "b.safetensors")
    assert same_bits(dict(plain.model.state_dict()), dict(calibrated.model.state_dict()))
    assert load_checkpoint(tmp_path / "a.safetensors").calibration is None


def test_few_stills_give_no_calibration_and_it_is_said(tmp_path, capfd):
    assert trained(tmp_path / "m.safetensors", stills=7).calibration is None
    assert "not calibrated: there are 7 training stills, and it takes at least 8" in capfd.readouterr().err


def test_half_weights_are_measured_as_they_are_stored(tmp_path):
    out = tmp_path / "m.safetensors"
    returned = trained(out, half=True)
    made = load_checkpoint(out)
    assert same_bits(dict(returned.model.state_dict()), dict(made.model.state_dict()))
    assert same_bits(dict(returned.branch.state_dict()), dict(made.branch.state_dict()))
    stored = made.calibration
    stills = training_stills(Stills(list(street_stills(16, SIZE)), SIZE), labelled=True)
    again = calibrate_checkpoint(made, stills, seed=3)
    assert again.digest == stored.digest
    assert again.loss == stored.loss
    for value in made.model.state_dict().values():
        assert not value.is_floating_point() or torch.equal(value, value.half().float())


def test_a_training_is_not_lost_where_its_model_cannot_be_calibrated(tmp_path, monkeypatch, capfd):
    import ttt_adapt.training.finish as finish
    from ttt_adapt.errors import ConfigError

    def refuse(*_args, **_keywords):
        raise ConfigError("no point to measure at")

    monkeypatch.setattr(finish, "calibrate_checkpoint", refuse)
    trained(tmp_path / "m.safetensors")
    assert load_checkpoint(tmp_path / "m.safetensors").calibration is None
    assert "not calibrated: no point to measure at" in capfd.readouterr().err


def test_a_training_that_stops_while_it_calibrates_goes_on_there(tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"

    def stop(*_args, **_keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "calibrate_trained", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(out)
    assert not out.exists()
    resumed = trained(out, resume=True)
    whole = trained(tmp_path / "whole.safetensors")
    assert resumed.calibration.digest == whole.calibration.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "whole.safetensors"]


def test_only_the_first_process_calibrates_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "rank", lambda: 1)
    monkeypatch.setattr(recipe, "calibrate_trained", lambda *_: pytest.fail("the second process calibrates"))
    trained(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_training_that_starts_from_a_calibrated_checkpoint_is_calibrated_anew(tmp_path):
    first = trained(tmp_path / "a.safetensors")
    second = trained(tmp_path / "b.safetensors", init=tmp_path / "a.safetensors")
    assert second.calibration.fingerprint != first.calibration.fingerprint
    second.calibration.check(second.model)
    third = trained(tmp_path / "c.safetensors", init=tmp_path / "a.safetensors", calibrate=False)
    assert load_checkpoint(tmp_path / "c.safetensors").calibration is third.calibration is None
