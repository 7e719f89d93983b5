"""The benchmark of the demo on ten streets: it goes on where it stopped, and its table adds up."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from report_inputs import make_run
from ttt_adapt.errors import StateError
from ttt_adapt.evaluation.report import Report

SOURCE = Path(__file__).parents[2] / "benchmarks" / "demo_streets.py"
CHECKPOINT = SimpleNamespace(spec=SimpleNamespace(size=(48, 64)))


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark as a module, whose runs are made up and noted in `made`."""
    spec = importlib.util.spec_from_file_location("demo_streets", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.made = []

    def run_arm(arm, _checkpoint, _clip, config, *, name, label):
        module.made.append((arm.name, config.seed))
        frames = [0.5 if arm.name == "fixed" else 0.55 + 0.001 * (i % 3) for i in range(60)]
        return make_run(label, name, config.seed, frames[0], per_frame=frames, losses=[None] * 60)

    monkeypatch.setattr(module, "run_arm", run_arm)
    return module


def test_only_runs_that_the_report_lacks_are_made(benchmark, tmp_path):
    file = tmp_path / "street-7.json"
    benchmark.street_report(file, CHECKPOINT, 7, ["fixed", "online"], [0], 60)
    assert benchmark.made == [("fixed", 0), ("online", 0)]
    benchmark.made.clear()
    report = benchmark.street_report(file, CHECKPOINT, 7, ["fixed", "online"], [0, 1], 60)
    assert benchmark.made == [("fixed", 1), ("online", 1)]
    assert len(report.runs) == len(Report.load(file).runs) == 4


def test_runs_of_other_settings_are_refused(benchmark, tmp_path):
    file = tmp_path / "street-7.json"
    benchmark.street_report(file, CHECKPOINT, 7, ["fixed"], [0], 60)
    with pytest.raises(StateError, match="other values of frames"):
        benchmark.street_report(file, CHECKPOINT, 7, ["fixed"], [0], 61)


def test_the_table_has_gain_and_interval_of_each_street_and_their_mean(benchmark, tmp_path):
    reports = [
        benchmark.street_report(tmp_path / f"{street}.json", CHECKPOINT, street, ["fixed", "online"], [0, 1], 60)
        for street in (7, 8, 9)
    ]
    header, _, *rows = benchmark.summary(reports, ["fixed", "online"], [0, 1]).splitlines()[:6]
    assert header == "| street | fixed | online | points [95 %] |"
    for row, name in zip(rows, ("7", "8", "9", "**mean**"), strict=True):
        assert row.startswith(f"| {name} | 50.00 | 55.00 (+10.0 %) | +5.10 [+5.")
    assert "online gains on 3 of 3 streets" in benchmark.summary(reports, ["fixed", "online"], [0, 1])
