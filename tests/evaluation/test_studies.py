"""The paper's analyses: what each runs, what it writes, and that it goes on where it was."""

from __future__ import annotations

import pytest
from PIL import Image

import ttt_adapt.evaluation.session as session
from arm_inputs import CONFIG, checkpoint, write_clip
from command_line import fail, invoke
from report_inputs import sweep_report
from ttt_adapt import StreamConfig
from ttt_adapt.arms import find_arm
from ttt_adapt.data import open_clips
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.session import evaluate
from ttt_adapt.evaluation.studies import STUDIES, Study, find_study, rows_of_study
from ttt_adapt.evaluation.tables import study_table

pytestmark = pytest.mark.usefixtures("committed")


@pytest.fixture
def clips(tmp_path) -> list:
    """Two clips, of 2 and 5 frames."""
    for name, count in (("dusk", 2), ("noon", 5)):
        write_clip(tmp_path / "data" / name, count, count)
    return open_clips(tmp_path / "data")


def run_study(study: Study, clips, files, out) -> Report:
    return evaluate(rows_of_study(study, clips, files[:1]), clips, CONFIG, [0], out, study=study)


def rows(name: str, longest: int = 20) -> dict[str, tuple]:
    return {s.label: (s.arm, s.value, dict(s.changes), dict(s.branch)) for s in find_study(name).rows(longest)}


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
    settings = find_study(name).rows(8)
    assert settings[0].arm == "fixed"
    assert len({row.label for row in settings}) == len(settings) > 2
    for row in settings:
        find_arm(row.arm)
        StreamConfig.online(**row.changes)


def test_an_unknown_study_comes_with_the_nearest():
    with pytest.raises(ConfigError, match="no study 'windows'; nearest: 'window'"):
        find_study("windows")


# What is written ---------------------------------------------------------------------------------------------------


def test_a_study_writes_its_table_and_plots_and_runs_nothing_twice(tmp_path, clips, files, counted):
    out = tmp_path / "out"
    report = run_study(find_study("window"), clips, files, out)
    made = len(counted)
    assert made == 2 * len(find_study("window").rows(5))
    expected = {"report.json", "table.md", "miou.png", "dusk.png", "noon.png", "window.md", "window.png", "loss.png"}
    assert {path.name for path in out.iterdir()} == expected
    assert report.config["study"] == "window"
    assert report.config["rows"]["Window 4"]["changes"] == {"window": 4}
    text = (out / "window.md").read_text()
    assert text.startswith("## Window size\n")
    assert "| Window all |" in text
    assert min(Image.open(out / "window.png").size) > 300
    assert run_study(find_study("window"), clips, files, out).runs == report.runs
    assert len(counted) == made


def test_a_broken_off_study_goes_on(tmp_path, clips, files, counted, monkeypatch):
    study = Study("memory", "Memory", "", False, lambda _: find_study("memory").rows(5)[:3])
    real = session.run_arm

    def stop(*args, **keywords):
        if len(counted) == 3:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(session, "run_arm", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, clips, files, tmp_path / "out")
    report = run_study(study, clips, files, tmp_path / "out")
    assert len(counted) == 6
    assert (tmp_path / "out" / "memory.png").is_file()
    assert {(run.arm, run.clip) for run in report.runs} == {
        (arm, clip) for arm in ("Fixed", "No memory", "Implicit only") for clip in ("dusk", "noon")
    }


def test_the_mask_ratio_is_the_settings_while_it_runs_and_the_branchs_afterwards(tmp_path, clips, files, monkeypatch):
    seen = []

    def watch(arm, made, *args, **keywords):
        seen.append((keywords["label"], made.branch.mask_ratio))
        return run_arm(arm, made, *args, **keywords)

    monkeypatch.setattr(session, "run_arm", watch)
    settings = [
        Row("fixed", "Fixed"),
        *(Row("online", f"{r}", value=r, branch={"mask_ratio": r}) for r in (0.25, 0.9)),
    ]
    study = Study("mask-ratio", "Mask ratio", "share", False, lambda _: [*settings, Row("online", "own")])
    report = run_study(study, clips[:1], files, tmp_path / "out")
    own = checkpoint().branch.mask_ratio
    assert dict(seen) == {"Fixed": own, "0.25": 0.25, "0.9": 0.9, "own": own}
    assert len({tuple(run.losses) for run in report.runs}) == 4
    assert report.config["rows"]["0.25"]["branch"] == {"mask_ratio": 0.25}


def test_the_command_runs_a_study(tmp_path, clips, files, monkeypatch, capsys):
    call = ["eval", tmp_path / "data", f"--checkpoint={files[0]}", f"--out={tmp_path / 'out'}", "--set=batch_size=2"]
    assert "shuffled" in invoke(*call, "--study=smoothness", "--clips=dusk")
    assert (tmp_path / "out" / "smoothness.md").is_file()
    told = fail(capsys, monkeypatch, *call, "--study=smoothness", "--arms=fixed")
    assert "leave out --arms" in told
    assert "no study 'shuffle'" in fail(capsys, monkeypatch, *call, "--study=shuffle")


# Tables ------------------------------------------------------------------------------------------------------------


def test_the_table_of_a_study_has_one_row_per_setting_averaged_over_clips():
    lines = study_table(sweep_report(), "Window", "fixed").splitlines()
    assert lines[0] == "## Window"
    assert "| fixed | 50.00 ± 0.00 | 40.00 ± 0.00 |  |" in "\n".join(lines)
    # k16 gains 16 points on every frame of both clips, and 0.1 with the second seed
    assert "| k16 | 66.05 ± 0.07 | 56.05 ± 0.07 |" in "\n".join(lines)
    assert lines[-1] == "Clips: dusk, noon. Seeds: 2. Intervals draw clips and seeds."
    with pytest.raises(DataError, match="no runs"):
        study_table(Report(), "Window", "fixed")
