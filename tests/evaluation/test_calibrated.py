"""What calibrations of checkpoints mean for an evaluation."""

from __future__ import annotations

import pytest

from arm_inputs import checkpoint, frames, two_rows
from report_inputs import make_report
from ttt_adapt.evaluation.calibrated import DEFAULT_ARMS, chosen_settings, default_arms, digests
from ttt_adapt.evaluation.captions import calibration_note, score_note
from ttt_adapt.evaluation.rows import describe
from ttt_adapt.tasks.calibrate import SourceStills, calibrate_checkpoint
from ttt_adapt.tasks.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(a calibrated checkpoint, another one, one without a branch), as files."""
    folder = tmp_path_factory.mktemp("calibrated")
    stills = SourceStills([frame for frame, _ in frames(9)])
    for name, changes, settings in (
        ("a", {}, {"lr": 3e-4, "window": 4}),
        ("b", {}, {}),
        ("main", {"branch": None}, {}),
    ):
        made = checkpoint(**changes)
        found = calibrate_checkpoint(made, stills, choose=False)
        made.calibration = found.replace(settings=settings)
        if made.branch is not None:
            made.branch.calibration = made.calibration  # which is the one that is saved
        save_checkpoint(folder / f"{name}.safetensors", made)
    return [folder / f"{name}.safetensors" for name in ("a", "b", "main")]


def test_calibrated_statistics_are_compared_where_all_checkpoints_have_them(calibrated, files):
    with_branch, other, main = calibrated
    assert default_arms([with_branch, other]) == ("fixed", "calibrated", *DEFAULT_ARMS[1:])
    assert default_arms([with_branch, files[0]]) == default_arms(files) == default_arms([]) == DEFAULT_ARMS
    assert default_arms([main]) == ("fixed", "calibrated")
    assert default_arms([main, with_branch]) == ("fixed", "calibrated", *DEFAULT_ARMS[1:])


def test_settings_are_those_that_the_calibration_chose(calibrated, files):
    assert chosen_settings(calibrated[0]) == {"lr": 3e-4, "window": 4}
    assert chosen_settings(calibrated[1]) == chosen_settings(files[0]) == {}


def test_a_row_depends_on_the_calibrations_of_its_checkpoints(calibrated, files):
    plain = describe(two_rows(files)[1])
    assert "calibrations" not in plain
    assert digests(files) == []
    mixed = describe(two_rows([calibrated[0], files[0]])[1])["calibrations"]
    assert mixed == digests([calibrated[0], files[0]])
    assert mixed[0] is not None
    assert mixed[1] is None


def test_the_text_below_a_table_says_which_models_were_calibrated():
    report = make_report()
    assert calibration_note(report) == ""
    report.config["rows"] = {"fixed": {"calibrations": ["abc"]}, "online": {"calibrations": ["abc"]}}
    assert calibration_note(report) == "Calibration of the models: abc."
    assert "Calibration of the models: abc." in score_note(report, "fixed")
    report.config["rows"] = {"fixed": {}, "online": {"calibrations": ["abc", None]}}
    assert calibration_note(report) == "Calibration of the models: fixed none; online abc, none."
