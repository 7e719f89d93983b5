"""Reports: storage, tables, figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from report_inputs import make_report, make_run
from ttt_adapt.errors import DataError, StateError
from ttt_adapt.evaluation.report import Report, Run, write_json
from ttt_adapt.evaluation.tables import markdown_table
from ttt_adapt.tasks.segmentation.score import SegmentationScore

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("report.json"))


# Storage -----------------------------------------------------------------------------------------------------------


def test_a_run_takes_its_numbers_from_the_score():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    score = SegmentationScore(2, classes=("road", "car"))
    score.update(np.array([[0, 1]]), np.array([[0, 0]]))
    score.update(np.array([[0, 1]]), np.array([[255, 255]]))
    score.update(np.array([[0, 0]]), np.array([[0, 0]]))
    run = Run.from_score("online", "dusk", 3, score, losses=[None, float("inf"), 0.25], ms=[90.0, 10.0, 12.0])
    assert (run.arm, run.clip, run.seed) == ("online", "dusk", 3)
    assert run.scores["miou"] == pytest.approx(3 / 4)
    assert run.scores["miou_frames"] == pytest.approx(3 / 4)
    assert run.per_class == {"road": 0.75, "car": None}
    assert run.per_frame == [0.5, None, 1.0]
    assert run.losses == [None, None, 0.25]
    assert run.ms_per_frame == 11.0  # the first frame warms up
    with pytest.raises(DataError, match="losses has 1 values for 3 frames"):
        Run.from_score("online", "dusk", 3, score, losses=[None], ms=[1.0, 1.0, 1.0])


def test_a_saved_report_comes_back_equal(tmp_path):
    report = make_report()
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report


def test_an_interrupted_evaluation_knows_what_it_has(tmp_path):
    make_report().save(tmp_path / "report.json")
    report = Report.load(tmp_path / "report.json")
    assert report.has("fixed", "dusk", 2)
    assert not report.has("fixed", "dusk", 3)
    assert not report.has("fixed", "day", 0)
    with pytest.raises(StateError, match="'fixed' on clip 'dusk' with seed 2"):
        report.add(make_run("fixed", "dusk", 2))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    make_report().save(path)
    old = path.read_bytes()
    with pytest.raises(DataError, match="JSON"):
        write_json(path, Report(config={"model": object()}))
    with pytest.raises(DataError, match="JSON"):
        write_json(path, Report(runs=[make_run(miou=float("nan"))]))

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, Report())
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}', '{"format": 1, "runs": [{}]}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json"):
        Report.load(path)


def test_a_report_of_a_newer_format_says_what_to_do(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"format": 99}')
    with pytest.raises(DataError, match=r"format 99, .* reads formats up to 2: update ttt_adapt"):
        Report.load(path)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Report.load(tmp_path / "report.json")


# Imports -----------------------------------------------------------------------------------------------------------


def test_importing_the_evaluation_modules_imports_no_optional_package():
    code = (
        "import sys, ttt_adapt.data, ttt_adapt.evaluation.report, ttt_adapt.evaluation.plots;"
        "print([n for n in ('torchmetrics', 'matplotlib', 'PIL', 'rich', 'timm') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Format 1 ----------------------------------------------------------------------------------------------------------


def former_run(arm: str, seed: int, **scores) -> dict:
    """A run in the layout of format 1, which has the scores of all tasks as fields."""
    none = dict.fromkeys(("miou", "miou_frames", "pixel_accuracy", "j", "j_frames", "psnr", "psnr_frames", "psnr_grey"))
    none |= dict.fromkeys(("ssim", "flicker", "lpips", "fid", "inception_score"))
    times = {"fps": None, "peak_memory_mib": None, "forwards": None, "ms_per_frame": 20.0}
    per_frame = {"per_frame": [0.25, None, 0.5], "losses": [None, 1.0, 0.5]}
    marks = {"streaming": True, "oracle": False}
    return {"arm": arm, "clip": "dusk", "seed": seed, **times, **per_frame, **marks, **none, **scores}


def former_report(path: Path, runs: list[dict]) -> Report:
    config = {"seeds": [0], "contenders": {"Online": {"arm": "online"}, "Fixed": {"arm": "fixed"}}}
    path.write_text(json.dumps({"format": 1, "config": config, "environment": {}, "runs": runs, "failures": []}))
    return Report.load(path)


def test_a_report_of_format_1_gives_the_table_that_it_gave(tmp_path):
    scores = {"miou": 0.4, "miou_frames": 0.375, "pixel_accuracy": 0.9, "per_class": {"road": 0.4, "car": None}}
    runs = [former_run("Fixed", 0, **scores), former_run("Online", 0, **{**scores, "miou": 0.5})]
    report = former_report(tmp_path / "report.json", runs)
    assert report.reference == "Online"  # asked for first
    assert report.runs[0].scores == {"miou": 0.4, "miou_frames": 0.375, "pixel_accuracy": 0.9}
    assert report.runs[0].per_class == {"road": 0.4, "car": None}
    table = markdown_table(report)
    assert "| Fixed | 40.00 (-20.0%) | 37.50 (+0.0%) | 20.0 |" in table
    assert "### IoU of every class (%), mean over clips and seeds" in table
    assert "| road | 40.00 | 40.00 |" in table
    report.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["format"] == 2
    assert Report.load(tmp_path / "new.json") == report


def test_a_report_of_format_1_of_another_task_keeps_its_scores(tmp_path):
    scores = {"task": "colorization", "psnr": 21.0, "psnr_frames": 21.5, "flicker": 0.0, "per_class": {}}
    (run,) = former_report(tmp_path / "report.json", [former_run("Fixed", 0, **scores)]).runs
    assert (run.task, run.scores) == ("colorization", {"psnr": 21.0, "psnr_frames": 21.5, "flicker": 0.0})


def test_a_report_of_format_1_without_the_fields_that_came_later_is_read(tmp_path):
    run = former_run("Fixed", 0, miou=0.4)
    for name in ("j", "j_frames", "fps", "peak_memory_mib", "forwards", "psnr"):
        del run[name]
    (loaded,) = former_report(tmp_path / "report.json", [run]).runs
    assert (loaded.task, loaded.fps, loaded.scores) == ("segmentation", None, {"miou": 0.4})


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_reports_of_the_benchmarks_give_the_tables_beside_them(file):
    assert markdown_table(Report.load(file)) == file.with_name("table.md").read_text(encoding="utf-8")
