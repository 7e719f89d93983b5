"""Rows and clips of an evaluation: how they are chosen, and what does not go together."""

from __future__ import annotations

import numpy as np
import pytest

import ttt_adapt.evaluation.rows as rows_module
from arm_inputs import CONFIG, VIT, checkpoint, two_rows
from ttt_adapt.data.drift import Drift, parse_drifts
from ttt_adapt.errors import CheckpointError, ConfigError, MissingPackageError
from ttt_adapt.evaluation.rows import Row, clips_from, rows_of, unheeded
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.tasks.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("committed")


def test_settings_are_of_all_arms_or_of_one():
    rows = rows_of(["fixed", "tent"], [], [], {"tent": {"lr": 1e-3}}, {"loss_on": "all"})
    assert [dict(row.changes) for row in rows] == [{}, {"lr": 1e-3}]
    assert {tuple(row.branch.items()) for row in rows} == {(("loss_on", "all"),)}
    with pytest.raises(ConfigError, match=r"online\.lr is to change, and online is none of the arms tent"):
        rows_of(["tent"], [], [], {"online": {"lr": 1e-3}})


def test_a_row_knows_its_arm_by_any_of_its_names():
    assert rows_of(["no_memory"], [], changes={"no-memory": {"lr": 1.0}}) == rows_of(
        ["no-memory"], [], changes={"no_memory": {"lr": 1.0}}
    )
    assert Row("implicit_only", "I") == Row("implicit", "I")
    assert Row("offline-1000", "O") == Row("offline", "O")
    with pytest.raises(ConfigError, match="no arm 'offlin'"):
        Row("offlin", "O")


@pytest.mark.parametrize(("asked", "named"), [("offline-1000", "offline-1000"), ("every-4", "every-04")])
def test_changes_find_their_arm_however_its_number_is_spelled(asked, named):
    (row,) = rows_of([asked], [], changes={named: {"lr": 1e-3}})
    assert row.changes == {"lr": 1e-3}


def test_arms_that_replace_a_common_setting_are_found():
    rows = rows_of(["fixed", "online", "no-memory", "paper", "tent", "tent+class"], [], changes={"tent": {"lr": 1.0}})
    config = CONFIG.replace(window=4, lr=0.5, source_pull=0.25)
    assert unheeded(rows, config, ["window", "lr", "source_pull", "batch_size"]) == {
        "window": {"no-memory": 1, "paper": 16},
        "lr": {"paper": 1e-4},
        "source_pull": {"paper": 0.0, "tent": 0.0, "tent+class": 0.0},
        "batch_size": {"paper": 32},
    }
    assert unheeded(rows, config.replace(window=16), ["window"]) == {"window": {"no-memory": 1}}
    assert unheeded(rows, config, []) == {}


def test_what_does_not_fit_fails_before_anything_runs_or_is_written(tmp_path, clips, files, counted):
    save_checkpoint(tmp_path / "vit.safetensors", checkpoint(**VIT))
    save_checkpoint(tmp_path / "main.safetensors", checkpoint(branch=None))
    save_checkpoint(tmp_path / "other.safetensors", checkpoint(classes=("cat", "dog")))
    fixed = two_rows(files[:1])[0]
    bad = [
        (Row("norm-ema", "BN", (tmp_path / "vit.safetensors",)), ConfigError, "no BatchNorm"),
        (Row("online", "O", (tmp_path / "main.safetensors",)), ConfigError, "main task alone"),
        (Row("fixed", "F", (tmp_path / "other.safetensors",)), CheckpointError, "cat, dog; clip dusk has road"),
        (Row("online", "O", (files[0], tmp_path / "none.safetensors")), CheckpointError, "no checkpoint"),
    ]
    for row, kind, match in bad:
        with pytest.raises(kind, match=match):
            evaluate([fixed, row], clips, CONFIG, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not counted


def test_every_clip_comes_under_every_drift_and_without_one_where_none_is_asked_for(tmp_path, clips):
    found = clips_from(str(tmp_path / "data"), [], None, drifts=parse_drifts(["none,night:4", "none@2..rain@3"]))
    drifts = ("", " night:4", " none@2..rain:3@3")
    assert [clip.name for clip in found] == [f"{name}{drift}" for name in ("dusk", "noon") for drift in drifts]
    np.testing.assert_array_equal(found[0][1][0], clips[0][1][0])
    np.testing.assert_array_equal(found[1][1][0], Drift("night", 4).apply(clips[0][1][0], 1))
    np.testing.assert_array_equal(found[1][1][1], clips[0][1][1])
    assert [len(clip) for clip in found] == [3, 3, 5] * 2
    with pytest.raises(ConfigError, match="4 parts, and the stream has only 3 frames"):
        clips_from(str(tmp_path / "data"), [], None, drifts=parse_drifts(["none..rain..none..rain"]))


def test_rows_of_one_name_are_refused(tmp_path, clips, files):
    with pytest.raises(ConfigError, match="two rows are called 'Fixed'"):
        evaluate([two_rows(files)[0]] * 2, clips, CONFIG, [0], tmp_path / "out")


def test_a_missing_package_stops_before_the_first_run(tmp_path, clips, files, monkeypatch, counted):
    monkeypatch.setattr(rows_module.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else 1)
    with pytest.raises(MissingPackageError, match=r"matplotlib is not installed.*ttt-adapt\[eval\]"):
        evaluate(two_rows(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    assert not counted
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("costs", "match"), [({"onlin": 2}, "'online'"), ({"online": 0}, "above 0")])
def test_costs_that_do_not_fit_stop_before_the_first_run(costs, match, tmp_path, clips, files):
    with pytest.raises(ConfigError, match=match):
        evaluate(two_rows(files), clips, CONFIG, [0], tmp_path / "out", real_time=(costs))
    assert not (tmp_path / "out").exists()
