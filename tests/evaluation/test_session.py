"""`evaluate`: what a result may depend on, what it leaves behind, and what crashes and a second call do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import ttt_adapt.evaluation.session as session
from arm_inputs import CONFIG, checkpoint, two_rows
from command_line import status
from ttt_adapt.arms import ARMS
from ttt_adapt.data import LabelledClip, open_clips
from ttt_adapt.errors import ConfigError, DataError, StateError
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.rows import Row, rows_of
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.session import check_failures, evaluate
from ttt_adapt.tasks.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("committed")


def results(report: Report) -> list:
    return [(run.arm, run.clip, run.seed, run.scores["miou"], run.losses) for run in report.runs]


def test_evaluate_runs_every_row_on_every_clip_with_every_seed_and_writes_it_down(tmp_path, clips, files):
    out = tmp_path / "out"
    report = evaluate(two_rows(files[:1]), clips, CONFIG, [0, 1], out)
    assert {(run.arm, run.clip, run.seed) for run in report.runs} == {
        (arm, clip, seed) for arm in ("Fixed", "Online") for clip in ("dusk", "noon") for seed in (0, 1)
    }
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "miou.png", "dusk.png", "noon.png"}
    assert results(Report.load(out / "report.json")) == results(report)
    table = (out / "table.md").read_text()
    assert "| Online |" in table
    assert "dusk: mIoU (%)" in table
    for name in ("miou", "dusk", "noon"):
        assert min(Image.open(out / f"{name}.png").size) > 300


def test_each_seed_has_its_own_checkpoint(tmp_path, clips, files):
    report = evaluate(two_rows(files), clips[:1], CONFIG, [0, 1], tmp_path / "out")
    for seed, file in enumerate(files):
        run = run_arm(
            ARMS["online"],
            load_checkpoint(file),
            clips[0],
            CONFIG.replace(seed=seed),
            name="dusk",
            label="Online",
        )
        ours = next(r for r in report.runs if r.arm == "Online" and r.seed == seed)
        assert (ours.scores["miou"], ours.losses) == (run.scores["miou"], run.losses)


def test_a_clip_of_one_frame_is_evaluated_to_the_end(tmp_path, clips, files):
    for later in (1, 2):
        for kind in ("images", "labels"):
            (tmp_path / "data" / "dusk" / kind / f"{later}.png").unlink()
    report = evaluate(two_rows(files[:1]), open_clips(tmp_path / "data", ["dusk"]), CONFIG, [0], tmp_path / "out")
    assert [len(run.per_frame) for run in report.runs] == [1, 1]
    assert (tmp_path / "out" / "dusk.png").stat().st_size > 1000


def test_a_file_where_the_results_should_go_is_refused_and_stays(tmp_path, clips, files):
    before = files[0].read_bytes()
    with pytest.raises(ConfigError, match="a file; expected a folder"):
        evaluate(two_rows(files[:1]), clips, CONFIG, [0], files[0])
    assert files[0].read_bytes() == before


def test_a_row_may_change_the_configuration_and_says_so(tmp_path, clips, files):
    rows = [Row("online", name, tuple(files[:1]), changes) for name, changes in (("a", {}), ("b", {"lr": 0.0}))]
    rows.append(Row("fixed", "Fixed", tuple(files[:1])))
    report = evaluate(rows, clips[:1], CONFIG, [0], tmp_path / "out")
    scores = {run.arm: run.per_frame for run in report.runs}
    assert scores["b"] == scores["Fixed"] != scores["a"]
    assert report.config["rows"]["b"]["changes"] == {"lr": 0.0}
    assert "changes" not in report.config["rows"]["a"]


def test_real_time_charges_given_costs_and_measures_the_others_once(tmp_path, clips, files, monkeypatch):
    measured = []
    monkeypatch.setattr(session, "measure_forwards", lambda arm, *_: measured.append(arm.name) or 1.4)
    rows = rows_of(["fixed", "implicit", "online", "every-4", "online-shuffled"], files[:1])
    costs = {"online": 3, "every-04": 2}
    report = evaluate(rows, clips, CONFIG, [0, 1], tmp_path / "out", real_time=costs)
    charged = {run.arm: run.forwards for run in report.runs}
    assert charged == {
        "Fixed": 1.4,
        "Implicit Memory Only": 1.4,
        "Online TTT-MAE": 3,
        "Online TTT-MAE, every 4 frames": 2,
        "Online TTT-MAE, shuffled frames": None,
    }
    assert measured == ["fixed", "implicit"]
    assert report.config["real_time"] == {"online": 3, "every-4": 2}
    assert "Online TTT-MAE 3" in (tmp_path / "out" / "table.md").read_text()
    losses = [run.losses for run in report.select("Online TTT-MAE", "dusk")]
    assert [[loss is None for loss in run] for run in losses] == [[False, True, True]] * 2
    with pytest.raises(DataError, match="other settings"):
        evaluate(rows, clips, CONFIG, [0, 1], tmp_path / "out")


# Crashes --------------------------------------------------------------------------------------------------------------


def crash(monkeypatch, arm: str, clip: str, error: Exception) -> None:
    """One arm breaks off in the middle of one clip."""
    real = session.run_arm

    def run(found, checkpoint, clip_, config, **keywords):
        if (found.name, keywords["name"]) != (arm, clip):
            return real(found, checkpoint, clip_, config, **keywords)

        def broken():
            yield clip_[0]
            raise error

        return real(found, checkpoint, broken(), config, **keywords)

    monkeypatch.setattr(session, "run_arm", run)


def test_a_crash_in_one_run_loses_nothing_of_the_others(tmp_path, clips, files, monkeypatch):
    whole = evaluate(two_rows(files), clips, CONFIG, [0, 1], tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash(patch, "online", "dusk", RuntimeError("the GPU\nfell off"))
        report = evaluate(two_rows(files), clips, CONFIG, [0, 1], tmp_path / "out")
    kept = [result for result in results(whole) if result[:2] != ("Online", "dusk")]
    assert results(report) == kept
    assert [(f["arm"], f["clip"], f["seed"]) for f in report.failures] == [("Online", "dusk", 0), ("Online", "dusk", 1)]
    assert report.failures[0]["error"] == "RuntimeError: the GPU fell off"
    assert Report.load(tmp_path / "out" / "report.json").failures == report.failures
    assert "the GPU fell off" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(StateError, match=r"2 runs failed: Online on dusk, seed 0.*fell off.*report.json: 6 runs"):
        check_failures(report, tmp_path / "out")
    again = evaluate(two_rows(files), clips, CONFIG, [0, 1], tmp_path / "out")  # the same command makes the rest
    assert sorted(results(again), key=str) == sorted(results(whole), key=str)
    assert again.failures == Report.load(tmp_path / "out" / "report.json").failures == []
    check_failures(again, tmp_path / "out")


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.full((48, 64), 9, np.uint8), "1.png holds label id 9; expected 0..2 or 255"),
        (np.zeros((24, 32), np.uint8), "1.png is 24 x 32, its frame 1.png is 48 x 64"),
    ],
    ids=["id", "size"],
)
def test_a_bad_label_file_costs_its_clip_and_is_named_once_before_any_run_of_it(
    array, told, tmp_path, clips, files, counted
):
    Image.fromarray(array).save(tmp_path / "data" / "noon" / "labels" / "1.png")
    report = evaluate(two_rows(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert counted == ["fixed dusk", "online dusk"] * 2
    (failure,) = report.failures
    assert (failure["arm"], failure["clip"]) == (None, "noon")
    assert told in failure["error"]
    assert f"- every arm on noon: DataError: {tmp_path}" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(StateError, match=r"1 clip cannot be scored: .*1\.png.*report.json: 4 runs"):
        check_failures(report, tmp_path / "out")
    assert Report.load(tmp_path / "out" / "report.json").failures == report.failures


def test_labels_are_read_once_before_a_clips_first_run_and_not_where_nothing_is_missing(
    tmp_path, clips, files, monkeypatch, counted
):
    checked = []
    real = LabelledClip.check_labels
    monkeypatch.setattr(
        LabelledClip, "check_labels", lambda clip: checked.append((clip.name, len(counted))) or real(clip)
    )
    evaluate(two_rows(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert checked == [("dusk", 0), ("noon", 1)]
    evaluate(two_rows(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert len(checked) == 2


def test_where_every_run_fails_the_error_says_so(tmp_path, clips, files, monkeypatch):
    crash(monkeypatch, "fixed", "dusk", OSError("no disk"))
    with pytest.raises(StateError, match="1 run failed: .*no disk.*report.json: 0 runs"):
        evaluate(two_rows(files)[:1], clips[:1], CONFIG, [0], tmp_path / "out")


def test_the_command_prints_the_table_and_ends_with_status_1(tmp_path, clips, files, monkeypatch, capsys):
    crash(monkeypatch, "online", "dusk", RuntimeError("broken [arm]"))
    call = ["eval", tmp_path / "data", f"--checkpoint={files[0]}", f"--out={tmp_path / 'out'}", "--set=batch_size=2"]
    assert status(monkeypatch, *call, "--arms=fixed,online") == 1
    captured = capsys.readouterr()
    assert "Fixed" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: 1 run failed: Online")
    assert "broken [arm]" in captured.err


# Resuming -------------------------------------------------------------------------------------------------------------


def test_a_second_call_runs_nothing_again(tmp_path, clips, files, counted):
    config = CONFIG.replace(crop_size=(32, 32))
    first = evaluate(two_rows(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    again = evaluate(two_rows(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    assert results(again) == results(first)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, clips, files, counted, monkeypatch):
    whole = evaluate(two_rows(files), clips, CONFIG, [0], tmp_path / "whole")
    counted.clear()
    real = session.run_arm

    def stop(*args, **keywords):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(session, "run_arm", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(two_rows(files), clips, CONFIG, [0], tmp_path / "out")
    assert len(Report.load(tmp_path / "out" / "report.json").runs) == 2
    report = evaluate(two_rows(files), clips, CONFIG, [0], tmp_path / "out")
    assert counted == ["fixed dusk", "fixed noon", "online dusk", "online noon"]
    assert results(report) == results(whole)


def test_results_of_other_settings_or_of_other_weights_are_not_mixed(tmp_path, clips, files, counted):
    evaluate(two_rows(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    for changes in ({"config": CONFIG.replace(lr=0.5)}, {"seeds": [0, 1]}, {"clips": clips[:1]}):
        arguments = {"rows": two_rows(files[:1]), "clips": clips, "config": CONFIG, "seeds": [0], **changes}
        with pytest.raises(DataError, match="other settings"):
            evaluate(**arguments, out=tmp_path / "out")
    save_checkpoint(files[0], checkpoint(9))  # the same name, trained anew
    with pytest.raises(DataError, match="other settings"):
        evaluate(two_rows(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == text
    assert len(counted) == 4


def test_results_of_other_frames_or_of_another_device_setting_are_not_gone_on_with(tmp_path, clips, files):
    rows = rows_of(["fixed"], files[:1])
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / "data" / "dusk" / kind / "0.png", tmp_path / "data" / "dusk" / kind / "3.png")
    with pytest.raises(DataError, match=r"other settings \(clips\)"):
        evaluate(rows, open_clips(tmp_path / "data"), CONFIG, [0], tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    saved["config"]["device"] = "cuda"
    (tmp_path / "out" / "report.json").write_text(json.dumps(saved))
    with pytest.raises(DataError, match=r"other settings \(device\)"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_file_painted_anew_is_another_clip_even_where_name_and_length_are_the_same(kind, tmp_path, clips, files):
    rows = rows_of(["fixed"], files[:1])
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    file = tmp_path / "data" / "noon" / kind / "1.png"
    written = bytearray(file.read_bytes())
    written[-20] ^= 1
    file.write_bytes(written)
    with pytest.raises(DataError, match=r"other settings \(clips\)"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("commit", "another"),
        ("platform", "Plan9"),
        ("python", "3.99"),
        ("torch_threads", 96),
        ("cuda_device", "NVIDIA H900"),
        ("cpu_count", 1024),
        ("packages", {"torch": "0.4"}),
    ],
)
def test_other_code_or_another_machine_does_not_go_on(name, value, tmp_path, clips, files, monkeypatch, counted):
    rows = rows_of(["fixed"], files[:1])
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    here = session.environment()
    monkeypatch.setattr(session, "environment", lambda: {**here, name: value})
    shown = "torch" if name == "packages" else name
    with pytest.raises(DataError, match=rf"begun with another .*{shown} \(.*, now .*, or set `overwrite`"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == text
    assert counted == ["fixed dusk", "fixed noon"]


def test_uncommitted_code_begins_no_report_that_others_go_on_with_and_goes_on_with_none(
    tmp_path, clips, files, monkeypatch, capsys
):
    rows = rows_of(["fixed"], files[:1])
    clean = session.environment()
    for first, then, told in ((True, False, "made by uncommitted code"), (False, True, "uncommitted changes")):
        out = tmp_path / str(first)
        monkeypatch.setattr(session, "environment", lambda now=first: {**clean, "dirty": now})
        report = evaluate(rows, clips, CONFIG, [0], out)
        report.failures.append({"arm": "Fixed", "clip": "dusk", "seed": 9, "error": "E"})
        with pytest.raises(StateError, match="commit it, and choose another folder" if first else "same command tries"):
            check_failures(report, out)
        monkeypatch.setattr(session, "environment", lambda now=then: {**clean, "dirty": now})
        with pytest.raises(DataError, match=rf"{told}.*choose another folder"):
            evaluate(rows, clips, CONFIG, [0], out)
    monkeypatch.setattr(session, "environment", lambda: {**clean, "dirty": True})
    with pytest.raises(DataError, match="made by uncommitted code"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "True")


def test_an_installed_package_without_a_commit_goes_on(tmp_path, clips, files, monkeypatch, counted):
    here = session.environment()
    monkeypatch.setattr(session, "environment", lambda: {**here, "commit": None, "dirty": None})
    rows = rows_of(["fixed"], files[:1])
    for _ in range(2):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    assert counted == ["fixed dusk", "fixed noon"]
