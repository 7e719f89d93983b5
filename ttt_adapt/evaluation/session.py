"""One evaluation: rows side by side on labelled clips, with a report saved after every run, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.arms import find_arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.data import Clip
from ttt_adapt.errors import DataError, StateError
from ttt_adapt.evaluation.environment import differing, environment
from ttt_adapt.evaluation.plots import plot_bars
from ttt_adapt.evaluation.realtime import measure_forwards
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.rows import Row, check, check_seeds, describe, fingerprints, metric_files
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.stream_plot import plot_stream
from ttt_adapt.evaluation.studies import Study, write_study
from ttt_adapt.evaluation.tables import describe_failure, markdown_table
from ttt_adapt.files import check_place, output_folder, refuse_existing
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.view.terminal import counted, notice, progress_bar


def evaluate(
    rows: Sequence[Row],
    clips: Sequence[Clip],
    config: StreamConfig,
    seeds: Sequence[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    real_time: Mapping[str, float] | None = None,
    study: Study | None = None,
    metric_weights: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Run every row on every clip with every seed, and write report.json, table.md and plots into `out`.

    The report is saved after every run, so that the same call goes on after an interruption. If a run fails, its error
    goes to `failures`, and the next run is made. Before the first run on a clip its labels are read once. If they do
    not fit, all runs on this clip are left out, and the error goes to `failures` too. See `check_failures`.

    Args:
        rows: what to run; the first is the reference of the relative changes. A row with several checkpoints runs the
            i-th one with the i-th seed, so that seeds cover training too.
        clips: clips of the checkpoints' task, whose classes are theirs.
        config: of the online arm.
        seeds: of adaptation, each once.
        out: folder for the results.
        device: where to run.
        real_time: score as if frames did not wait (see `ttt_adapt.evaluation.realtime`): forward passes per frame by
            arm; those of other streaming arms are measured. None lets the frames wait.
        study: what the rows are of; writes NAME.md, NAME.png and loss.png too.
        metric_weights: folder of the networks that some metrics are measured with; None leaves those out.
        overwrite: start anew where there are results, and replace them.

    Raises:
        ConfigError, CheckpointError, DataError, MissingPackageError: something does not fit, or `out` holds results
            of other settings, of another machine or of other code, or no results but other files; before anything
            runs or is written.
        StateError: every run failed.
    """
    costs = None if real_time is None else {find_arm(arm).name: cost for arm, cost in real_time.items()}
    check_place(out, folder=True)
    check_seeds(seeds, config)
    check(rows, clips, config, device, costs, metric_weights)
    file = out / "report.json"
    if not file.exists():
        refuse_existing(out, overwrite)
    output_folder(out, folder=True)
    settings = {
        "config": asdict(config),
        "seeds": list(seeds),
        "rows": {row.label: describe(row) for row in rows},
        "clips": {clip.name: clip.describe() for clip in clips},
        "device": str(device),
        **({} if costs is None else {"real_time": costs}),
        **({} if study is None else {"study": study.name}),
        **({} if metric_weights is None else {"metric_weights": fingerprints(metric_files(rows, metric_weights))}),
    }
    report = Report(config=settings, environment=environment()) if overwrite else _open_report(file, settings)
    if report.runs:
        notice(f"kept in {file}: {counted(len(report.runs), 'finished run')}; only what is missing is run")

    def make(row: Row, checkpoint: Checkpoint, clip: Clip, seed: int) -> Run:
        own = config.replace(seed=seed)
        with _branch_settings(checkpoint, row.branch):
            forwards = None if costs is None else _forwards(report, row, checkpoint, clip, own, costs)
            return _run(row, checkpoint, clip, own, forwards, metric_weights)

    try:
        _make_missing(report, file, _missing(report, rows, clips, seeds), make, device)
    except BaseException:
        if report.runs:
            kept = counted(len(report.runs), "finished run")
            notice(f"kept in {file}: {kept}; {_way_on(report, 'goes on')}")
        raise
    if not report.runs:
        check_failures(report, out)
    _write(report, out)
    if study is not None:
        write_study(report, study, rows, out)
    return report


def check_failures(report: Report, out: Path) -> None:
    """Raises StateError if a run failed or a clip cannot be scored, naming each; what the others found is kept."""
    if report.failures:
        clips = sum(failure["arm"] is None for failure in report.failures)
        runs = len(report.failures) - clips
        counts = [f"{counted(clips, 'clip')} cannot be scored"] * bool(clips)
        counts += [f"{counted(runs, 'run')} failed"] * bool(runs)
        lines = "; ".join(describe_failure(failure) for failure in report.failures)
        raise StateError(
            f"{' and '.join(counts)}: {lines}. Kept in {out / 'report.json'}: {counted(len(report.runs), 'run')}; "
            f"{_way_on(report, 'tries what failed again')}"
        )


def _way_on(report: Report, what: str) -> str:
    """What the user can do to get the runs that are missing."""
    if report.environment.get("dirty"):
        return "results of uncommitted code cannot be continued: commit it, and choose another folder"
    return f"the same command {what}"


# ---- what runs

Job = tuple[Row, Path, Clip, int]
"""A run that is to be made: row, checkpoint, clip and seed."""


def _missing(report: Report, rows: Sequence[Row], clips: Sequence[Clip], seeds: Sequence[int]) -> Iterator[Job]:
    """The runs that the report does not hold yet."""
    for i, seed in enumerate(seeds):
        for row in rows:
            for clip in clips:
                if not report.has(row.label, clip.name, seed):
                    yield row, row.checkpoints[i % len(row.checkpoints)], clip, seed


def _make_missing(
    report: Report,
    file: Path,
    jobs: Iterator[Job],
    make: Callable[[Row, Checkpoint, Clip, int], Run],
    device: torch.device | str,
) -> None:
    """Make runs and save the report after each; a failed run is recorded, and the next one starts."""
    loaded: dict[Path, Checkpoint] = {}  # the checkpoint of the last run, if its model is whole
    fits: dict[str, bool] = {}
    report.failures.clear()
    for row, path, clip, seed in jobs:
        if clip.name not in fits:
            fits[clip.name] = _check_labels(report, file, clip)
        if not fits[clip.name]:
            continue
        try:
            if path not in loaded:
                loaded.clear()
                loaded[path] = load_checkpoint(path, device)
            report.add(make(row, loaded[path], clip, seed))
        except Exception as error:  # the other runs are still made
            loaded.clear()  # the crash may have left the model changed
            _note(report, file, {"arm": row.label, "clip": clip.name, "seed": seed}, error)
        else:
            report.save(file)


def _check_labels(report: Report, file: Path, clip: Clip) -> bool:
    """Whether the clip's labels can be scored on; if not, that is noted."""
    try:
        clip.check_labels()
    except Exception as error:  # the other clips still run
        _note(report, file, {"arm": None, "clip": clip.name, "seed": None}, error)
        return False
    return True


def _note(report: Report, file: Path, what: dict[str, Any], error: Exception) -> None:
    report.failures.append({**what, "error": " ".join(f"{type(error).__name__}: {error}".split())})
    notice(f"failed, going on with the next: {describe_failure(report.failures[-1])}")
    report.save(file)


def _run(
    row: Row,
    checkpoint: Checkpoint,
    clip: Clip,
    config: StreamConfig,
    forwards: float | None,
    metric_weights: Path | None,
) -> Run:
    """One run, with a progress bar."""
    headline = checkpoint.task.metrics[0].title
    with progress_bar(f"{row.label} on {clip.name}, seed {config.seed}", len(clip)) as advance:
        return run_arm(
            find_arm(row.arm),
            checkpoint,
            clip,
            config,
            name=clip.name,
            label=row.label,
            ignore=clip.ignore,
            changes=row.changes,
            forwards=forwards,
            metric_weights=metric_weights,
            on_frame=lambda _index, _frame, _prediction, found, loss: advance(
                loss if loss is not None else f"this frame: {headline} {found:.3f}"
            ),
        )


def _forwards(
    report: Report, row: Row, checkpoint: Checkpoint, clip: Clip, config: StreamConfig, costs: Mapping[str, float]
) -> float | None:
    """What a frame costs a streaming arm: as given, as an earlier run was charged, or measured; None for others."""
    arm = find_arm(row.arm)
    if not arm.streaming:
        return None
    if row.arm in costs:
        return costs[row.arm]
    earlier = (run.forwards for run in report.select(row.label) if run.forwards is not None)
    return next(earlier, None) or measure_forwards(arm, checkpoint, clip, config, row.changes)


def _branch_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """A context with the row's settings of the reconstruction branch; nothing for other branches."""
    branch = checkpoint.branch
    return branch.using(**settings) if settings and isinstance(branch, MAEBranch) else nullcontext()


# ---- what is written and read


def _write(report: Report, out: Path) -> None:
    """The table, a bar chart, and a plot for each clip."""
    (out / "table.md").write_text(markdown_table(report), encoding="utf-8")
    plot_bars(out / f"{report.headline.field}.png", report)
    for clip in report.clips:
        name = clip.replace(":", "-")[:200]  # schedules of drifts can be longer than names of files may be
        plot_stream(out / f"{name}.png", report.select(clip=clip))
    seen = {name for run in report.runs for name, score in run.per_class.items() if score is not None}
    absent = [name for name in report.runs[0].per_class if name not in seen]
    if absent:
        notice(f"no label of these clips shows {', '.join(absent)}: n/a in the table, and in no mean")


def _open_report(path: Path, settings: dict[str, Any]) -> Report:
    if not path.exists():
        return Report(config=settings, environment=environment())
    report = Report.load(path)
    known = json.loads(json.dumps(settings))  # JSON has no tuples
    if other := [name for name in {*known, *report.config} if report.config.get(name) != known.get(name)]:
        raise DataError(
            f"{path} holds results of other settings ({', '.join(sorted(other))}): choose another folder, or set "
            "`overwrite`"
        )
    _check_same_code(path, report.environment, environment())
    return report


def _check_same_code(path: Path, before: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises DataError if the report was begun with other code, versions or hardware, or with unknown code."""
    if before.get("dirty"):
        raise DataError(
            f"{path} was made by uncommitted code, which cannot be compared with the code that runs now: choose "
            "another folder, or set `overwrite`"
        )
    if here["dirty"]:
        raise DataError(
            f"the code that runs has uncommitted changes (git status), so it cannot go on with {path}: commit or stash "
            "them, or choose another folder"
        )
    if other := differing(before, here):
        raise DataError(f"{path} was begun with another {', '.join(other)}: choose another folder, or set `overwrite`")
