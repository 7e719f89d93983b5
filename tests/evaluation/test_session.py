"""What every result is measured by: J, paired intervals, memory, and what bad input and crashes leave behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import clips, contenders, counted, files, results  # noqa: F401
from test_report import make_report, make_run

import ttt_adapt.evaluation.rows as contenders_module
import ttt_adapt.evaluation.session as command
from arm_inputs import CONFIG, arm_run_by, checkpoint, frames
from ttt_adapt import StreamConfig, cli
from ttt_adapt.arms import ARMS, Arm, find_arm
from ttt_adapt.cli.options import parse_settings, per_arm
from ttt_adapt.data import LabelledClip, open_clips
from ttt_adapt.errors import ConfigError, DataError, FrameError, FrameTypeError, MissingPackageError, StateError
from ttt_adapt.evaluation.differences import average_difference, paired_difference
from ttt_adapt.evaluation.memory import PeakMemory
from ttt_adapt.evaluation.report import Report, markdown_table
from ttt_adapt.evaluation.rows import Contender, RealTime, contenders_of, real_time_of
from ttt_adapt.evaluation.runner import run_arm
from ttt_adapt.evaluation.runners import start
from ttt_adapt.evaluation.session import check_failures, evaluate
from ttt_adapt.evaluation.statistics import paired_bootstrap
from ttt_adapt.tasks.segmentation.score import SegmentationScore

pytestmark = pytest.mark.usefixtures("committed")

# Region similarity -------------------------------------------------------------------------------------------------


def test_j_is_the_iou_of_the_foreground_over_the_clip_and_per_frame():
    score = SegmentationScore(2)
    pairs = [
        ([[0, 1, 1, 1]], [[0, 0, 1, 1]]),  # 2 / 3
        ([[0, 0, 0, 0]], [[0, 0, 0, 1]]),  # 0 / 1
        ([[0, 0, 0, 0]], [[0, 0, 0, 0]]),  # nothing there, nothing found: 1, as in DAVIS' code
        ([[0, 1, 1, 1]], [[255, 255, 1, 1]]),  # void: 2 / 2
        ([[1, 1, 1, 1]], [[255, 255, 255, 255]]),  # all void: no frame
    ]
    for prediction, labels in pairs:
        score.update(np.array(prediction), np.array(labels))
    result = score.result()
    assert result["j"] == pytest.approx(4 / 6)
    assert result["j_frames"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert result["j"] == result["per_class"]["1"]


def test_j_is_not_defined_for_more_classes_or_without_foreground():
    score = SegmentationScore(3)
    score.update(np.array([[0, 1]]), np.array([[0, 1]]))
    assert (score.result()["j"], score.result()["j_frames"]) == (None, None)
    empty = SegmentationScore(2)
    empty.update(np.array([[0, 0]]), np.array([[0, 0]]))
    assert (empty.result()["j"], empty.result()["j_frames"]) == (None, 1.0)


def test_the_table_has_columns_for_j_and_memory_where_runs_hold_them():
    assert " J " not in markdown_table(make_report())
    report = Report(runs=[make_run(arm, "dog", 0, 0.5, j=0.25, j_frames=0.5, peak_memory_mib=12.0) for arm in "ab"])
    header, _, first = markdown_table(report).splitlines()[:3]
    assert header.endswith("| dog: J (%) | dog: frame J (%) | dog: ms/frame | dog: peak MiB |")
    assert first.endswith("| 25.00 | 50.00 | 20.0 | 12.0 |")


# Paired differences ------------------------------------------------------------------------------------------------


def two_arms(fps: float | None = None, count: int = 60) -> Report:
    random = np.random.default_rng(0)
    report = Report()
    for seed in range(2):
        for arm, gain in (("fixed", 0.0), ("online", 0.1)):
            per_frame = [None if i == 3 else float(v) for i, v in enumerate(0.4 + gain + 0.05 * random.random(count))]
            report.add(make_run(arm, "dusk", seed, per_frame=per_frame, losses=[None] * count, fps=fps))
    return report


def test_the_paired_difference_draws_seeds_and_blocks_of_frames():
    report = two_arms()
    arrays = {arm: np.array([run.per_frame for run in report.select(arm)], float) for arm in report.arms}
    found = paired_difference(report, "online", "fixed", "dusk")
    expected = paired_bootstrap(arrays["online"], arrays["fixed"], block=10)
    assert (found.mean, found.low, found.high, found.block) == (*expected, 10)
    assert [*found.by_seed] == [0, 1]
    assert [*found.by_seed.values()] == pytest.approx(np.nanmean(arrays["online"] - arrays["fixed"], axis=1))


@pytest.mark.parametrize(
    ("fps", "count", "block"), [(15.0, 101, 15), (0.99, 62, 10), (None, 60, 10), (30.0, 60, 14), (30.0, 5, 1)]
)
def test_a_block_is_a_second_and_ten_frames_but_at_most_a_quarter_of_the_clip(fps, count, block):
    assert paired_difference(two_arms(fps, count), "online", "fixed", "dusk").block == block


def test_a_clip_of_one_frame_has_a_difference_and_no_interval():
    report = Report(
        runs=[make_run(arm, "one", 0, score, per_frame=[score]) for arm, score in (("a", 0.5), ("b", 0.75))]
    )
    found = paired_difference(report, "b", "a", "one")
    assert (found.mean, found.low, found.high) == (pytest.approx(0.25), None, None)
    assert "| b | +25.00 |" in markdown_table(report)


def test_arms_are_compared_on_the_clips_that_both_ran_or_not_at_all():
    report = make_report()  # fixed never ran on day
    assert paired_difference(report, "online", "fixed", "day") is None
    assert average_difference(report, "online", "fixed") == paired_difference(report, "online", "fixed", "dusk")
    report.runs = [run for run in report.runs if (run.arm, run.clip) != ("online", "dusk")]
    assert average_difference(report, "online", "fixed") is None
    assert "| online | n/a | n/a, n/a, n/a |" in markdown_table(report)


def test_the_mean_over_clips_draws_clips():
    gains = [0.1, 0.2, 0.6, 0.3]
    report = Report()
    for clip, gain in enumerate(gains):
        for arm, extra in (("fixed", 0.0), ("online", gain)):
            report.add(make_run(arm, f"clip{clip}", 0, 0.2 + extra, per_frame=[0.2 + extra] * 8))
    found = average_difference(report, "online", "fixed")
    assert (found.mean, found.low, found.high) == pytest.approx(paired_bootstrap(gains, np.zeros(4)))
    assert "### Mean over clips (intervals draw clips)" in markdown_table(report)


def test_the_table_states_difference_interval_and_block():
    text = markdown_table(two_arms(fps=15.0))
    found = paired_difference(two_arms(fps=15.0), "online", "fixed", "dusk")
    assert f"| online | {100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}] | +" in text
    assert "frames per block: dusk 14" in text  # a quarter of 59 scored frames


def test_a_class_that_no_clip_shows_is_not_available_and_breaks_nothing():
    text = markdown_table(make_report())
    assert "| road | 40.00 | 55.50 |" in text
    assert "| car | n/a | n/a |" in text


# Memory ------------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_a_block_allocates_even_if_it_is_gone_at_the_end():
    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**18)  # 64 MiB
        del block
    if memory.mib is None:
        pytest.skip("this system does not say how much memory a process uses")
    assert 50 < memory.mib < 200


def test_memory_that_the_system_does_not_tell_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr("ttt_adapt.evaluation.memory._CLEAR", tmp_path / "no" / "file")
    with PeakMemory(torch.device("cpu")) as memory:
        pass
    assert memory.mib is None


def test_a_run_holds_memory_and_rate():
    class Clip(list):
        fps = 12.5

    run = run_arm(ARMS["fixed"], checkpoint(), Clip(frames(2)), CONFIG, name="clip")
    assert run.fps == 12.5
    assert run.peak_memory_mib is None or run.peak_memory_mib >= 0


# Bad input ---------------------------------------------------------------------------------------------------------


def answering(monkeypatch, output) -> Arm:
    class Runner:
        loss = None

        def step(self, frame):
            return output

        def close(self) -> None:
            pass

    return arm_run_by(monkeypatch, lambda *_: Runner(), "answering")


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(1, 3, 12, 16), FrameError, r"answering on dusk returned \[1, 3, 12, 16\]; .*\[1, 3, 48, 64\]"),
        (torch.zeros(1, 4, 48, 64), FrameError, r"returned \[1, 4, 48, 64\]"),
        (torch.zeros(3, 48, 64), FrameError, r"returned \[3, 48, 64\]"),
        ([1, 2], FrameTypeError, "returned a list"),
    ],
)
def test_predictions_of_wrong_shape_are_refused_with_what_was_expected(output, error, message, monkeypatch):
    with pytest.raises(error, match=message):
        run_arm(answering(monkeypatch, output), checkpoint(), frames(1), CONFIG, name="dusk")


def test_a_clip_without_frames_or_without_labelled_pixels_is_named():
    with pytest.raises(DataError, match="clip empty has no frames"):
        run_arm(ARMS["fixed"], checkpoint(), [], CONFIG, name="empty")
    void = [(frame, np.full_like(labels, 255)) for frame, labels in frames(2)]
    with pytest.raises(DataError, match="clip night has no labelled pixel"):
        run_arm(ARMS["fixed"], checkpoint(), void, CONFIG, name="night")


def test_a_clip_of_one_frame_is_evaluated_to_the_end(tmp_path, clips, files):  # noqa: F811
    one = open_clips(tmp_path / "data", ["dusk"])
    one[0]._files = one[0]._files[:1]
    report = evaluate(contenders(files[:1]), one, CONFIG, [0], tmp_path / "out")
    assert [len(run.per_frame) for run in report.runs] == [1, 1]
    assert (tmp_path / "out" / "dusk.png").stat().st_size > 1000


def test_a_missing_package_stops_before_the_first_run(tmp_path, clips, files, monkeypatch, counted):  # noqa: F811
    monkeypatch.setattr(contenders_module.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else 1)
    with pytest.raises(MissingPackageError, match=r"matplotlib is not installed.*ttt-adapt\[eval\]"):
        evaluate(contenders(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    assert not counted
    assert not (tmp_path / "out").exists()


def test_rows_of_one_name_are_refused(tmp_path, clips, files):  # noqa: F811
    with pytest.raises(ConfigError, match="two rows are called 'Fixed'"):
        evaluate([contenders(files)[0]] * 2, clips, CONFIG, [0], tmp_path / "out")


# Crashes -----------------------------------------------------------------------------------------------------------


def crash(monkeypatch, arm: str, clip: str, error: Exception) -> None:
    """One arm breaks off in the middle of one clip."""
    real = command.run_arm

    def run(found, checkpoint, clip_, config, **keywords):
        if (found.name, keywords["name"]) != (arm, clip):
            return real(found, checkpoint, clip_, config, **keywords)

        def broken():
            yield clip_[0]
            raise error

        return real(found, checkpoint, broken(), config, **keywords)

    monkeypatch.setattr(command, "run_arm", run)


def test_a_crash_in_one_run_loses_nothing_of_the_others(tmp_path, clips, files, monkeypatch):  # noqa: F811
    whole = evaluate(contenders(files), clips, CONFIG, [0, 1], tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash(patch, "online", "dusk", RuntimeError("the GPU\nfell off"))
        report = evaluate(contenders(files), clips, CONFIG, [0, 1], tmp_path / "out")
    kept = [result for result in results(whole) if result[:2] != ("Online", "dusk")]
    assert results(report) == kept
    assert [(f["arm"], f["clip"], f["seed"]) for f in report.failures] == [("Online", "dusk", 0), ("Online", "dusk", 1)]
    assert report.failures[0]["error"] == "RuntimeError: the GPU fell off"
    assert Report.load(tmp_path / "out" / "report.json").failures == report.failures
    assert "the GPU fell off" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(StateError, match=r"2 runs failed: Online on dusk, seed 0.*fell off.*report.json: 6 runs"):
        check_failures(report, tmp_path / "out")
    again = evaluate(contenders(files), clips, CONFIG, [0, 1], tmp_path / "out")  # the same command makes the rest
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
    array, told, tmp_path, clips, files, counted  # noqa: F811
):  # fmt: skip
    Image.fromarray(array).save(tmp_path / "data" / "noon" / "labels" / "1.png")
    report = evaluate(contenders(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert counted == ["fixed dusk", "online dusk"] * 2
    (failure,) = report.failures
    assert (failure["arm"], failure["clip"]) == (None, "noon")
    assert told in failure["error"]
    assert f"- every arm on noon: DataError: {tmp_path}" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(StateError, match=r"1 clip cannot be scored: .*1\.png.*report.json: 4 runs"):
        check_failures(report, tmp_path / "out")
    assert Report.load(tmp_path / "out" / "report.json").failures == report.failures


def test_labels_are_read_once_before_a_clips_first_run_and_not_where_nothing_is_missing(
    tmp_path, clips, files, monkeypatch, counted  # noqa: F811
):  # fmt: skip
    checked = []
    real = LabelledClip.check_labels
    monkeypatch.setattr(
        LabelledClip, "check_labels", lambda clip: checked.append((clip.name, len(counted))) or real(clip)
    )
    evaluate(contenders(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert checked == [("dusk", 0), ("noon", 1)]
    evaluate(contenders(files[:1]), clips, CONFIG, [0, 1], tmp_path / "out")
    assert len(checked) == 2


def test_where_every_run_fails_the_error_says_so(tmp_path, clips, files, monkeypatch):  # noqa: F811
    crash(monkeypatch, "fixed", "dusk", OSError("no disk"))
    with pytest.raises(StateError, match="1 run failed: .*no disk.*report.json: 0 runs"):
        evaluate(contenders(files)[:1], clips[:1], CONFIG, [0], tmp_path / "out")


def test_the_command_prints_the_table_and_ends_with_status_1(tmp_path, clips, files, monkeypatch, capsys):  # noqa: F811
    crash(monkeypatch, "online", "dusk", RuntimeError("broken [arm]"))
    arguments = [f"--checkpoint={files[0]}", "--arms=fixed,online", f"--out={tmp_path / 'out'}", "--set=batch_size=2"]
    monkeypatch.setattr("sys.argv", ["ttt-adapt", "eval", str(tmp_path / "data"), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert "Fixed" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: 1 run failed: Online")
    assert "broken [arm]" in captured.err


# Real time and rows ------------------------------------------------------------------------------------------------


def test_real_time_charges_given_costs_and_measures_the_others_once(tmp_path, clips, files, monkeypatch):  # noqa: F811
    measured = []
    monkeypatch.setattr(command, "measure_forwards", lambda arm, *_: measured.append(arm.name) or 1.4)
    rows = contenders_of(["fixed", "implicit", "online", "online-shuffled"], files[:1], [])
    report = evaluate(rows, clips, CONFIG, [0, 1], tmp_path / "out", real_time=RealTime({"online": 3}))
    charged = {run.arm: run.forwards for run in report.runs}
    assert charged == {
        "Fixed": 1.4, "Implicit Memory Only": 1.4, "Online TTT-MAE": 3, "Online TTT-MAE, shuffled frames": None
    }  # fmt: skip
    assert measured == ["fixed", "implicit"]
    assert report.config["real_time"] == {"online": 3}
    assert "Online TTT-MAE 3" in (tmp_path / "out" / "table.md").read_text()
    losses = [run.losses for run in report.select("Online TTT-MAE", "dusk")]
    assert [[loss is None for loss in run] for run in losses] == [[False, True, True]] * 2
    with pytest.raises(DataError, match="other settings"):
        evaluate(rows, clips, CONFIG, [0, 1], tmp_path / "out")


def test_costs_are_read_from_the_command_line():
    arms = ("online", "tent")
    assert real_time_of(False, [], arms) is None
    assert real_time_of(True, ["online=4.1", "tent=2"], arms).forwards == {"online": 4.1, "tent": 2}
    with pytest.raises(ConfigError, match="--real-time"):
        real_time_of(False, ["online=4"], arms)
    with pytest.raises(ConfigError, match="expected a number"):
        real_time_of(True, ["online=fast"], arms)
    with pytest.raises(ConfigError, match="implicit is none of the arms online, tent"):
        real_time_of(True, ["implicit=4"], arms)


def test_settings_are_of_all_arms_or_of_one():
    assert per_arm(["lr=1e-4", "tent.lr=1e-3", "tent.window=2"]) == (["lr=1e-4"], {"tent": {"lr": 1e-3, "window": 2}})
    with pytest.raises(ConfigError, match="--seeds"):
        per_arm(["seed=3"])
    rows = contenders_of(["fixed", "tent"], [], [], {"tent": {"lr": 1e-3}}, {"loss_on": "all"})
    assert [dict(row.changes) for row in rows] == [{}, {"lr": 1e-3}]
    assert {tuple(row.branch.items()) for row in rows} == {(("loss_on", "all"),)}
    with pytest.raises(ConfigError, match=r"--set online\.lr: online is none of --arms tent"):
        contenders_of(["tent"], [], [], {"online": {"lr": 1e-3}})


def test_methods_of_others_have_no_pull_unless_they_are_given_one():
    config = StreamConfig.online()
    for name in ("tent", "self-train", "self-train-plain", "ema-teacher"):
        for changes, pull in (({}, 0.0), ({"source_pull": 0.25}, 0.25)):
            runner = start(find_arm(name), checkpoint(), config, changes)
            assert runner.adapter.config.source_pull == pull
            runner.close()
    runner = start(find_arm("online"), checkpoint(), config)
    assert runner.adapter.config == config
    runner.close()


@pytest.mark.parametrize(("costs", "match"), [({"onlin": 2}, "'online'"), ({"online": 0}, "above 0")])
def test_costs_that_do_not_fit_stop_before_the_first_run(costs, match, tmp_path, clips, files):  # noqa: F811
    with pytest.raises(ConfigError, match=match):
        evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "out", real_time=RealTime(costs))
    assert not (tmp_path / "out").exists()


def test_a_row_may_change_the_configuration_and_says_so(tmp_path, clips, files):  # noqa: F811
    rows = [Contender("online", name, tuple(files[:1]), changes) for name, changes in (("a", {}), ("b", {"lr": 0.0}))]
    rows.append(Contender("fixed", "Fixed", tuple(files[:1])))
    report = evaluate(rows, clips[:1], CONFIG, [0], tmp_path / "out")
    scores = {run.arm: run.per_frame for run in report.runs}
    assert scores["b"] == scores["Fixed"] != scores["a"]
    assert report.config["contenders"]["b"]["changes"] == {"lr": 0.0}
    assert "changes" not in report.config["contenders"]["a"]


def test_a_report_of_an_earlier_version_is_read(tmp_path):
    """Without the fields that came later."""
    make_report().save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    del data["failures"]
    for run in data["runs"]:
        for name in ("j", "j_frames", "fps", "peak_memory_mib", "forwards"):
            del run[name]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert Report.load(tmp_path / "report.json") == make_report()


# Resuming ----------------------------------------------------------------------------------------------------------


def test_results_of_other_frames_or_of_another_device_setting_are_not_gone_on_with(tmp_path, clips, files):  # noqa: F811
    rows = contenders_of(["fixed"], files[:1], [])
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    clips[0]._files.append(clips[0]._files[0])
    with pytest.raises(DataError, match=r"other settings \(clips\)"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    del clips[0]._files[-1]
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    saved["config"]["device"] = "cuda"
    (tmp_path / "out" / "report.json").write_text(json.dumps(saved))
    with pytest.raises(DataError, match=r"other settings \(device\)"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_file_painted_anew_is_another_clip_even_where_name_and_length_are_the_same(kind, tmp_path, clips, files):  # noqa: F811
    rows = contenders_of(["fixed"], files[:1], [])
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
def test_other_code_or_another_machine_does_not_go_on(name, value, tmp_path, clips, files, monkeypatch, counted):  # noqa: F811
    rows = contenders_of(["fixed"], files[:1], [])
    evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    here = command.environment()
    monkeypatch.setattr(command, "environment", lambda: {**here, name: value})
    shown = "torch" if name == "packages" else name
    with pytest.raises(DataError, match=rf"begun with another .*{shown} \(.*, now .*--out, or remove it"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == text
    assert counted == ["fixed dusk", "fixed noon"]


def test_uncommitted_code_begins_no_report_that_others_go_on_with_and_goes_on_with_none(
    tmp_path, clips, files, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    rows = contenders_of(["fixed"], files[:1], [])
    clean = command.environment()
    for first, then, told in ((True, False, "made by uncommitted code"), (False, True, "uncommitted changes")):
        out = tmp_path / str(first)
        monkeypatch.setattr(command, "environment", lambda now=first: {**clean, "dirty": now})
        report = evaluate(rows, clips, CONFIG, [0], out)
        report.failures.append({"arm": "Fixed", "clip": "dusk", "seed": 9, "error": "E"})
        with pytest.raises(StateError, match="commit it, and choose another --out" if first else "same command tries"):
            check_failures(report, out)
        monkeypatch.setattr(command, "environment", lambda now=then: {**clean, "dirty": now})
        with pytest.raises(DataError, match=rf"{told}.*choose another --out"):
            evaluate(rows, clips, CONFIG, [0], out)
    monkeypatch.setattr(command, "environment", lambda: {**clean, "dirty": True})
    with pytest.raises(DataError, match="made by uncommitted code"):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "True")


def test_an_installed_package_without_a_commit_goes_on(tmp_path, clips, files, monkeypatch, counted):  # noqa: F811
    here = command.environment()
    monkeypatch.setattr(command, "environment", lambda: {**here, "commit": None, "dirty": None})
    rows = contenders_of(["fixed"], files[:1], [])
    for _ in range(2):
        evaluate(rows, clips, CONFIG, [0], tmp_path / "out")
    assert counted == ["fixed dusk", "fixed noon"]


def test_arms_that_see_the_whole_clip_are_marked_and_never_the_best():
    report = Report()
    for seed in (0, 1):
        for arm, score in (("fixed", 0.5), ("online", 0.6), ("offline", 0.7), ("oracle", 0.8)):
            run = make_run(arm, seed=seed, miou=score + 0.001 * seed)
            run.streaming, run.oracle = arm in ("fixed", "online"), arm == "oracle"
            report.add(run)
    table = markdown_table(report)
    first, _, _ = table.partition("###")
    rows = {line.split("|")[1].strip(): line for line in first.splitlines() if line.startswith("| ")}
    assert "offline †" in rows
    assert "oracle ‡" in rows
    assert "**" in rows["online"]
    assert not any("**" in rows[name] for name in ("fixed", "offline †", "oracle ‡"))
    assert "chooses by the labels" in table


def test_settings_are_literals_or_text_and_true_and_false_may_be_small():
    given = ["drop_path=true", "deferred=False", "gate=none", "grad_clip=None", "crop_size=(8, 16)", "lr=1e-4"]
    assert parse_settings(given) == {
        "drop_path": True, "deferred": False, "gate": "none", "grad_clip": None, "crop_size": (8, 16), "lr": 1e-4,
    }  # fmt: skip
