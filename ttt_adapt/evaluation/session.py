"""`ttt-adapt eval`: arms side by side on labelled clips, with tables, a JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.arms import find_arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.data import Clip
from ttt_adapt.errors import ConfigError, DataError, StateError
from ttt_adapt.evaluation.environment import differing
from ttt_adapt.evaluation.plots import plot_bars, plot_stream
from ttt_adapt.evaluation.realtime import measure_forwards
from ttt_adapt.evaluation.report import Report, environment, markdown_table
from ttt_adapt.evaluation.rows import Contender, RealTime, check, check_seeds, describe, fingerprints
from ttt_adapt.evaluation.runner import run_arm
from ttt_adapt.evaluation.tables import describe_failure
from ttt_adapt.files import output_folder
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks import find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, read_spec
from ttt_adapt.view.terminal import counted, notice, progress_bar


def evaluate(
    contenders: Sequence[Contender],
    clips: Sequence[Clip],
    config: StreamConfig,
    seeds: Sequence[int],
    out: Path,
    device: torch.device | str = "cpu",
    *,
    real_time: RealTime | None = None,
    study: str | None = None,
    metric_weights: Path | None = None,
) -> Report:
    """Run every contender on every clip with every seed, and write report.json, table.md and plots into `out`.

    The report is saved after every run, so an interrupted evaluation goes on where it stopped. A run that breaks off
    is noted in `failures` and costs the others nothing; so does a clip with labels that do not fit, which are read
    once, before the clip's first run. See `check_failures`.

    Args:
        contenders: rows; the first is the reference of the relative changes. A contender with several checkpoints
            runs the i-th one with the i-th seed, so that seeds cover training too.
        clips: clips of the checkpoints' task, whose classes are theirs.
        config: of the online arm.
        seeds: of adaptation, each once.
        out: folder for the results.
        device: where to run.
        real_time: charge every streaming arm for its time; None lets the frames wait.
        study: what the rows are of, for the record.
        metric_weights: folder of the networks that some metrics are measured with; None leaves those out.

    Raises:
        ConfigError, CheckpointError, DataError, MissingPackageError: something does not fit, or `out` holds results
            of other settings, of another machine or of other code; before anything runs or is written.
        StateError: every run failed.
    """
    check_seeds(seeds, config)
    check(contenders, clips, config, device, real_time, metric_weights)
    job = _Job(contenders, clips, config, seeds, out, device, real_time, metric_weights)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, a file; expected a folder, new or of an evaluation that goes on")
    output_folder(out)
    report = _open_report(job.file, job.settings(study))
    if report.runs:
        notice(f"kept in {job.file}: {counted(len(report.runs), 'finished run')}; only what is missing is run")
    try:
        job.run_missing(report)
    except BaseException:
        if report.runs:
            kept = counted(len(report.runs), "finished run")
            notice(f"kept in {job.file}: {kept}; {_way_on(report, 'goes on')}")
        raise
    if not report.runs:
        check_failures(report, out)
    _write(report, out)
    return report


@dataclass(frozen=True)
class _Job:
    """What `evaluate` was asked for; its arguments."""

    contenders: Sequence[Contender]
    clips: Sequence[Clip]
    config: StreamConfig
    seeds: Sequence[int]
    out: Path
    device: torch.device | str
    real_time: RealTime | None
    metric_weights: Path | None

    @property
    def file(self) -> Path:
        """The report."""
        return self.out / "report.json"

    def settings(self, study: str | None) -> dict[str, Any]:
        """What the results depend on, for the record."""
        weights = None if self.metric_weights is None else _weights(self.contenders, self.metric_weights)
        return {
            "config": asdict(self.config),
            "seeds": list(self.seeds),
            "contenders": {contender.label: describe(contender) for contender in self.contenders},
            "clips": {clip.name: clip.describe() for clip in self.clips},
            "device": str(self.device),
            **({} if self.real_time is None else {"real_time": dict(self.real_time.forwards)}),
            **({} if study is None else {"study": study}),
            **({} if weights is None else {"metric_weights": fingerprints(weights)}),
        }

    def run_missing(self, report: Report) -> None:
        """Make every run that the report does not hold yet, and save it after each."""
        loaded: dict[Path, Checkpoint] = {}
        fits: dict[str, bool] = {}
        report.failures.clear()
        for i, seed in enumerate(self.seeds):
            for contender in self.contenders:
                path = contender.checkpoints[i % len(contender.checkpoints)]
                for clip in self.clips:
                    if report.has(contender.label, clip.name, seed):
                        continue
                    if clip.name not in fits:
                        fits[clip.name] = self._check_labels(report, clip)
                    if fits[clip.name]:
                        self._try(report, contender, path, clip, seed, loaded)

    def _check_labels(self, report: Report, clip: Clip) -> bool:
        """Whether the clip's labels can be scored on; if not, that is noted."""
        try:
            clip.check_labels()
        except Exception as error:  # costs this clip alone
            self._note(report, {"arm": None, "clip": clip.name, "seed": None}, error)
            return False
        return True

    def _try(
        self,
        report: Report,
        contender: Contender,
        path: Path,
        clip: Clip,
        seed: int,
        loaded: dict[Path, Checkpoint],
    ) -> None:
        """Make one run; `loaded` holds the checkpoint of the last one, if its model is whole."""
        try:
            if path not in loaded:
                loaded.clear()
                loaded[path] = load_checkpoint(path, self.device)
            config = self.config.replace(seed=seed)
            _run(report, contender, loaded[path], clip, config, self.real_time, self.metric_weights)
        except Exception as error:  # one arm's crash is not the others'
            loaded.clear()  # in whatever state the crash left it
            self._note(report, {"arm": contender.label, "clip": clip.name, "seed": seed}, error)
        else:
            report.save(self.file)

    def _note(self, report: Report, what: dict[str, Any], error: Exception) -> None:
        report.failures.append({**what, "error": " ".join(f"{type(error).__name__}: {error}".split())})
        notice(f"failed, going on with the next: {describe_failure(report.failures[-1])}")
        report.save(self.file)


def _weights(contenders: Sequence[Contender], folder: Path) -> list[Path]:
    """The files of metrics in the folder that the contenders' task knows."""
    known = find_task(read_spec(contenders[0].checkpoints[0]).task).weight_files
    return [folder / name for name in known if (folder / name).is_file()]


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
    """How to get the runs that are missing."""
    if report.environment.get("dirty"):
        return "nothing goes on with results of uncommitted code: commit it, and choose another --out"
    return f"the same command {what}"


def _write(report: Report, out: Path) -> None:
    (out / "table.md").write_text(markdown_table(report), encoding="utf-8")
    plot_bars(out / f"{report.headline.field}.png", report)
    for clip in report.clips:
        plot_stream(out / f"{clip}.png", report.select(clip=clip))
    seen = {name for run in report.runs for name, iou in run.per_class.items() if iou is not None}
    absent = [name for name in report.runs[0].per_class if name not in seen]
    if absent:
        notice(f"no label of these clips shows {', '.join(absent)}: n/a in the table, and in no mean")


def _run(
    report: Report,
    contender: Contender,
    checkpoint: Checkpoint,
    clip: Clip,
    config: StreamConfig,
    real_time: RealTime | None,
    metric_weights: Path | None,
) -> None:
    title = f"{contender.label} on {clip.name}, seed {config.seed}"
    with _branch_settings(checkpoint, contender.branch), progress_bar(title, len(clip)) as advance:
        run = run_arm(
            find_arm(contender.arm),
            checkpoint,
            clip,
            config,
            name=clip.name,
            label=contender.label,
            ignore=clip.ignore,
            changes=contender.changes,
            forwards=None if real_time is None else _forwards(report, contender, checkpoint, clip, config, real_time),
            metric_weights=metric_weights,
            on_frame=_loss_only(advance, checkpoint.task.metrics[0].title),
        )
    report.add(run)


def _forwards(
    report: Report,
    contender: Contender,
    checkpoint: Checkpoint,
    clip: Clip,
    config: StreamConfig,
    real_time: RealTime,
) -> float | None:
    """What a frame costs a streaming arm: as given, as an earlier run was charged, or measured; None for others."""
    arm = find_arm(contender.arm)
    if not arm.streaming:
        return None
    if contender.arm in real_time.forwards:
        return real_time.forwards[contender.arm]
    earlier = (run.forwards for run in report.select(contender.label) if run.forwards is not None)
    return next(earlier, None) or measure_forwards(arm, checkpoint, clip, config, contender.changes)


@contextmanager
def _branch_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[None]:
    """What a row hides and scores at test time; rows without reconstruction have no use for it."""
    branch = checkpoint.branch
    with branch.using(**settings) if settings and isinstance(branch, MAEBranch) else nullcontext():
        yield


def _loss_only(advance: Callable[[Any], None], title: str) -> Any:
    return lambda _index, _frame, _prediction, found, loss: advance(
        loss if loss is not None else f"{title} {found:.3f}"
    )


def _open_report(path: Path, settings: dict[str, Any]) -> Report:
    if not path.exists():
        return Report(config=settings, environment=environment())
    report = Report.load(path)
    known = json.loads(json.dumps(settings))  # JSON has no tuples
    if other := [name for name in {*known, *report.config} if report.config.get(name) != known.get(name)]:
        raise DataError(
            f"{path} holds results of other settings ({', '.join(sorted(other))}): choose another --out, or remove it"
        )
    _check_same_code(path, report.environment, environment())
    return report


def _check_same_code(path: Path, before: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises DataError where a table would be of two pieces: other code, versions or machine, or code unknown."""
    if before.get("dirty"):
        raise DataError(
            f"{path} was made by uncommitted code, which is not known any more: choose another --out, or remove it"
        )
    if here["dirty"]:
        raise DataError(
            f"the code that runs has uncommitted changes (git status), so it cannot go on with {path}: commit or stash "
            "them, or choose another --out"
        )
    if other := differing(before, here):
        raise DataError(
            f"{path} was begun with another {', '.join(other)}: choose another --out, or remove it, so that a table is "
            "of one piece"
        )
