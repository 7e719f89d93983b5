"""The paper's analyses: what each runs, what it writes, and that it goes on where it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from test_evaluation import counted, files  # noqa: F401
from test_report import make_run
from ttt_adapt.evaluation.study_session import run_study

import ttt_adapt.evaluation.session as command
from arm_inputs import CLASSES, CONFIG, checkpoint, frames
from ttt_adapt import StreamConfig, cli
from ttt_adapt.arms import find_arm
from ttt_adapt.data import open_clips
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.plots import plot_losses, plot_sweep
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.runner import run_arm
from ttt_adapt.evaluation.studies import STUDIES, Setting, Study, find_study
from ttt_adapt.evaluation.tables import study_table

pytestmark = pytest.mark.usefixtures("committed")


@pytest.fixture
def clips(tmp_path) -> list:
    """Two clips, of 3 and 5 frames."""
    root = tmp_path / "data"
    for name, count in (("dusk", 3), ("noon", 5)):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for index, (frame, labels) in enumerate(frames(count, seed=count)):
            Image.fromarray(frame).save(root / name / "images" / f"{index}.png")
            Image.fromarray(labels).save(root / name / "labels" / f"{index}.png")
    (root / "index.json").write_text(json.dumps({"classes": CLASSES, "clips": [{"clip": "dusk"}]}))
    return open_clips(root)


def rows(name: str, longest: int = 20) -> dict[str, tuple]:
    return {s.label: (s.arm, s.value, dict(s.changes), dict(s.branch)) for s in find_study(name).settings(longest)}


# What runs ---------------------------------------------------------------------------------------------------------


def test_memory_is_the_papers_table_4():
    assert [arm for arm, *_ in rows("memory").values()] == ["fixed", "no-memory", "implicit", "explicit", "online"]


@pytest.mark.parametrize(("longest", "sizes"), [(20, [1, 2, 4, 8, 16, 20]), (16, [1, 2, 4, 8, 16]), (1, [1])])
def test_windows_are_the_powers_of_two_and_all_frames(longest, sizes):
    found = [row for label, row in rows("window", longest).items() if row[1] is not None]
    assert [value for _, value, _, _ in found] == sizes
    assert [changes for _, _, changes, _ in found] == [{"window": k} for k in sizes]
    assert {arm for arm, *_ in found} == {"online"}


def test_the_automatic_window_takes_part():
    assert rows("window")["Window auto"] == ("online", None, {"window": "auto"}, {})


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_begins_with_the_fixed_model_and_knows_its_arms(name):
    settings = find_study(name).settings(8)
    assert settings[0].arm == "fixed"
    assert len({setting.label for setting in settings}) == len(settings) > 2
    for setting in settings:
        find_arm(setting.arm)
        StreamConfig.online(**setting.changes)


def test_an_unknown_study_comes_with_the_nearest():
    with pytest.raises(ConfigError, match="no study 'windows'; nearest: 'window'"):
        find_study("windows")


# What is written ---------------------------------------------------------------------------------------------------


def test_a_study_writes_its_table_and_plots_and_runs_nothing_twice(tmp_path, clips, files, counted):  # noqa: F811
    out = tmp_path / "out"
    report = run_study(find_study("window"), files[:1], clips, CONFIG, [0], out)
    made = len(counted)
    assert made == 2 * len(find_study("window").settings(5))
    expected = {"report.json", "table.md", "miou.png", "dusk.png", "noon.png", "window.md", "window.png", "loss.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert report.config["study"] == "window"
    assert report.config["contenders"]["Window 4"]["changes"] == {"window": 4}
    text = (out / "window.md").read_text()
    assert text.startswith("## Window size\n")
    assert "| Window all |" in text
    assert min(Image.open(out / "window.png").size) > 300
    assert run_study(find_study("window"), files[:1], clips, CONFIG, [0], out).runs == report.runs
    assert len(counted) == made


def test_a_broken_off_study_goes_on(tmp_path, clips, files, counted, monkeypatch):  # noqa: F811
    study = Study("memory", "Memory", "", False, lambda _: find_study("memory").settings(5)[:3])
    real = command.run_arm

    def stop(*args, **keywords):
        if len(counted) == 3:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_arm", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, files[:1], clips, CONFIG, [0], tmp_path / "out")
    report = run_study(study, files[:1], clips, CONFIG, [0], tmp_path / "out")
    assert len(counted) == 6
    assert (tmp_path / "out" / "memory.png").is_file()
    assert {(run.arm, run.clip) for run in report.runs} == {
        (arm, clip) for arm in ("Fixed", "No memory", "Implicit only") for clip in ("dusk", "noon")
    }


def test_the_mask_ratio_is_the_settings_while_it_runs_and_the_branchs_afterwards(tmp_path, clips, files, monkeypatch):  # noqa: F811
    seen = []

    def watch(arm, made, *args, **keywords):
        seen.append((keywords["label"], made.branch.mask_ratio))
        return run_arm(arm, made, *args, **keywords)

    monkeypatch.setattr(command, "run_arm", watch)
    settings = [
        Setting("Fixed", "fixed"),
        *(Setting(f"{r}", "online", r, branch={"mask_ratio": r}) for r in (0.25, 0.9)),
    ]
    study = Study("mask-ratio", "Mask ratio", "share", False, lambda _: [*settings, Setting("own", "online")])
    report = run_study(study, files[:1], clips[:1], CONFIG, [0], tmp_path / "out")
    own = checkpoint().branch.mask_ratio
    assert dict(seen) == {"Fixed": own, "0.25": 0.25, "0.9": 0.9, "own": own}
    assert len({tuple(run.losses) for run in report.runs}) == 4
    assert report.config["contenders"]["0.25"]["branch"] == {"mask_ratio": 0.25}


def test_the_command_runs_a_study(tmp_path, clips, files, monkeypatch, capsys):  # noqa: F811
    def call(*arguments: str) -> int:
        base = ["ttt-adapt", "eval", str(tmp_path / "data"), f"--checkpoint={files[0]}", f"--out={tmp_path / 'out'}"]
        monkeypatch.setattr("sys.argv", [*base, "--set=batch_size=2", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0

    assert call("--study=smoothness", "--clips=dusk") == 0
    assert "shuffled" in capsys.readouterr().out
    assert (tmp_path / "out" / "smoothness.md").is_file()
    assert call("--study=smoothness", "--arms=fixed") == 1
    assert "leave out --arms" in capsys.readouterr().err
    assert call("--study=shuffle") == 1
    assert "no study 'shuffle'" in capsys.readouterr().err


# Tables and figures ------------------------------------------------------------------------------------------------


def sweep_report() -> Report:
    report = Report()
    for seed in range(2):
        for clip, base in (("dusk", 0.4), ("noon", 0.6)):
            report.add(make_run("fixed", clip, seed, base))
            for k in (1, 4, 16):
                report.add(make_run(f"k{k}", clip, seed, base + 0.01 * k + 0.001 * seed))
    return report


def test_the_table_of_a_study_has_one_row_per_setting_averaged_over_clips():
    lines = study_table(sweep_report(), "Window", "fixed").splitlines()
    assert lines[0] == "## Window"
    assert "| fixed | 50.00 ± 0.00 | 40.00 ± 0.00 |  |" in "\n".join(lines)
    # k16 gains 16 points on every frame of both clips, and 0.1 with the second seed
    assert "| k16 | 66.05 ± 0.07 | 56.05 ± 0.07 |" in "\n".join(lines)
    assert lines[-1] == "Clips: dusk, noon. Seeds: 2. Intervals draw clips and seeds."
    with pytest.raises(DataError, match="no runs"):
        study_table(Report(), "Window", "fixed")


def test_the_sweep_figure_has_a_log_axis_with_every_setting_on_it(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("ttt_adapt.evaluation.plots._save", lambda figure, path: drawn.update(axes=figure.axes[0]))
    values = {"k1": 1, "k4": 4, "k16": 16, "k99": 99, "auto": None}
    report = sweep_report()
    report.add(make_run("auto", "dusk", 0, 0.5))
    plot_sweep(tmp_path / "sweep.png", report, values, "fixed", "frames in the window")
    axes = drawn["axes"]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "frames in the window"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    mean = next(line for line in axes.get_lines() if line.get_label() == "mean")
    np.testing.assert_allclose(mean.get_ydata(), [1.05, 4.05, 16.05])
    level = next(line for line in axes.get_lines() if line.get_label() == "auto")
    np.testing.assert_allclose(level.get_ydata(), 10.0)
    with pytest.raises(DataError, match="nothing to draw"):
        plot_sweep(tmp_path / "sweep.png", report, {"k99": 99}, "fixed", "k")


def test_the_loss_figure_draws_runs_relative_to_their_clip_and_leaves_out_arms_without_loss(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("ttt_adapt.evaluation.plots._save", lambda figure, path: drawn.update(axes=figure.axes[0]))
    report = Report()
    for clip, base in (("dusk", 0.4), ("noon", 0.6)):
        report.add(make_run("fixed", clip, 0, base))
        report.add(make_run("a", clip, 0, base, losses=[base, None]))
        report.add(make_run("b", clip, 0, base + 0.1, losses=[base - 0.2, base]))
    assert plot_losses(tmp_path / "loss.png", report)
    points = {c.get_label(): np.asarray(c.get_offsets()) for c in drawn["axes"].collections}
    assert points.keys() == {"a", "b"}
    np.testing.assert_allclose(points["a"], [[0.05, -5.0]] * 2)
    np.testing.assert_allclose(points["b"], [[-0.05, 5.0]] * 2)
    assert not plot_losses(tmp_path / "none.png", Report(runs=[make_run("fixed")]))
    assert not (tmp_path / "none.png").exists()
