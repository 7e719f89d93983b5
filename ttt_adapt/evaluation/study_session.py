"""`ttt-adapt eval --study`: one of the paper's analyses, as an evaluation with its own table and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.config import StreamConfig
from ttt_adapt.data import Clip
from ttt_adapt.evaluation.plots import plot_bars, plot_losses, plot_sweep
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.session import Contender, RealTime, evaluate
from ttt_adapt.evaluation.studies import Setting, Study
from ttt_adapt.evaluation.tables import study_table


def run_study(
    study: Study,
    checkpoints: Sequence[Path],
    clips: Sequence[Clip],
    config: StreamConfig,
    seeds: Sequence[int],
    out: Path,
    device: torch.device | str = "cpu",
    real_time: RealTime | None = None,
    branch: Mapping[str, Any] | None = None,
    metric_weights: Path | None = None,
) -> Report:
    """Run a study, and write all that `evaluate` writes, with NAME.md, NAME.png and loss.png.

    Args:
        study: which one.
        checkpoints: one for all seeds, or one per seed.
        clips: labelled clips.
        config: of the online arm; the study varies it.
        seeds: of adaptation.
        out: folder for the results; the same command goes on there.
        device: where to run.
        real_time: as for `evaluate`.
        branch: of all rows, see `MAEBranch.using`.
        metric_weights: as for `evaluate`.

    Raises:
        As `evaluate`.
    """
    settings = study.settings(max(len(clip) for clip in clips))
    rows = [Contender(s.arm, s.label, tuple(checkpoints), s.changes, {**(branch or {}), **s.branch}) for s in settings]
    report = evaluate(
        rows,
        clips,
        config,
        seeds,
        out,
        device,
        real_time=real_time,
        study=study.name,
        metric_weights=metric_weights,
    )
    _write(report, study, settings, out)
    return report


def _write(report: Report, study: Study, settings: Sequence[Setting], out: Path) -> None:
    reference = settings[0].label
    (out / f"{study.name}.md").write_text(study_table(report, study.title, reference), encoding="utf-8")
    if study.axis and reference in report.arms:
        values = {setting.label: setting.value for setting in settings[1:]}
        plot_sweep(out / f"{study.name}.png", report, values, reference, study.axis, study.log)
    else:
        plot_bars(out / f"{study.name}.png", report)
    plot_losses(out / "loss.png", report)
