"""`ttt-adapt eval`: arms side by side on labelled clips, with a table, a JSON and plots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.checkpoint import Checkpoint, load_checkpoint
from ttt_adapt.commands.common import notice, progress_bar
from ttt_adapt.config import StreamConfig
from ttt_adapt.data import LabelledClip, open_clips
from ttt_adapt.errors import CheckpointError, DataError
from ttt_adapt.evaluation.arms import ARMS, find_arms
from ttt_adapt.evaluation.plots import plot_bars, plot_stream
from ttt_adapt.evaluation.report import Report, environment, markdown_table
from ttt_adapt.evaluation.runner import run_arm


@dataclass(frozen=True)
class Contender:
    """One row of the table: an arm's name, its label there, and the checkpoint it runs, one file per seed."""

    arm: str
    label: str
    checkpoints: tuple[Path, ...]


def evaluate(
    contenders: Sequence[Contender],
    clips: Sequence[LabelledClip],
    config: StreamConfig,
    seeds: Sequence[int],
    out: Path,
    device: torch.device | str = "cpu",
) -> Report:
    """Run every contender on every clip with every seed, and write report.json, table.md and plots into `out`.

    The report is saved after every run, so an interrupted evaluation goes on where it stopped.

    Args:
        contenders: rows; the first is the reference of the relative changes. A contender with several checkpoints
            runs the i-th one with the i-th seed, so that seeds cover training too.
        clips: labelled clips whose classes are the checkpoints'.
        config: of the online arm.
        seeds: of adaptation.
        out: folder for the results.
        device: where to run.

    Raises:
        ConfigError, CheckpointError, DataError: something does not fit; before anything runs or is written.
    """
    _check(contenders, clips, config, device)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "config": asdict(config),
        "seeds": list(seeds),
        "contenders": {c.label: {"arm": c.arm, "checkpoints": _fingerprints(c.checkpoints)} for c in contenders},
        "clips": [clip.name for clip in clips],
        "size": list(clips[0].size or ()),
    }
    report = _open_report(out / "report.json", settings)
    try:
        _run_missing(report, contenders, clips, config, seeds, out, device)
    except BaseException:
        if report.runs:
            notice(f"{len(report.runs)} finished runs are kept in {out / 'report.json'}: the same command goes on")
        raise
    (out / "table.md").write_text(markdown_table(report, contenders[0].label), encoding="utf-8")
    plot_bars(out / "miou.png", report)
    for clip in clips:
        plot_stream(out / f"{clip.name}.png", report.select(clip=clip.name))
    return report


def _run_missing(
    report: Report,
    contenders: Sequence[Contender],
    clips: Sequence[LabelledClip],
    config: StreamConfig,
    seeds: Sequence[int],
    out: Path,
    device: torch.device | str,
) -> None:
    """Make every run that the report does not hold yet, and save it after each."""
    loaded: dict[Path, Checkpoint] = {}
    for i, seed in enumerate(seeds):
        for contender in contenders:
            path = contender.checkpoints[i % len(contender.checkpoints)]
            if path not in loaded:
                loaded = {path: load_checkpoint(path, device)}
            for clip in clips:
                if not report.has(contender.label, clip.name, seed):
                    _run(report, contender, loaded[path], clip, config.replace(seed=seed))
                    report.save(out / "report.json")


def _run(
    report: Report, contender: Contender, checkpoint: Checkpoint, clip: LabelledClip, config: StreamConfig
) -> None:
    title = f"{contender.label} on {clip.name}, seed {config.seed}"
    with progress_bar(title, len(clip)) as advance:
        run = run_arm(
            ARMS[contender.arm],
            checkpoint,
            clip,
            config,
            name=clip.name,
            label=contender.label,
            ignore=clip.ignore,
            on_frame=_loss_only(advance),
        )
    report.add(run)


def _loss_only(advance: Callable[[Any], None]) -> Any:
    return lambda _index, _frame, _prediction, miou, loss: advance(loss if loss is not None else f"mIoU {miou:.3f}")


def _open_report(path: Path, settings: dict[str, Any]) -> Report:
    if not path.exists():
        return Report(config=settings, environment=environment())
    report = Report.load(path)
    if report.config != json.loads(json.dumps(settings)):  # JSON has no tuples
        raise DataError(f"{path} holds results of other settings: choose another --out, or remove it")
    return report


def _check(
    contenders: Sequence[Contender], clips: Sequence[LabelledClip], config: StreamConfig, device: torch.device | str
) -> None:
    """Fail before the first run, not hours later: every checkpoint loads, suits its arms and knows the classes."""
    find_arms([contender.arm for contender in contenders])
    for path in dict.fromkeys(path for contender in contenders for path in contender.checkpoints):
        checkpoint = load_checkpoint(path, device)
        for clip in clips:
            _check_classes(checkpoint, clip, path)
        for contender in contenders:
            if path in contender.checkpoints:
                ARMS[contender.arm].start(checkpoint, config).close()


def _fingerprints(files: Sequence[Path]) -> list[str]:
    """Name and content of files, so that a file that was trained anew is another one."""
    return [f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for file in files]


def _check_classes(checkpoint: Checkpoint, clip: LabelledClip, path: Path) -> None:
    if tuple(checkpoint.spec.classes) != tuple(clip.classes):
        raise CheckpointError(
            f"{path} was trained on the classes {', '.join(checkpoint.spec.classes)}; "
            f"clip {clip.name} has {', '.join(clip.classes)}"
        )


def clips_from(data: str, names: Sequence[str], size: tuple[int, int] | None) -> list[LabelledClip]:
    """The labelled clips called `names` under the folder `data`; all of them without names."""
    return open_clips(data, list(names) or None, size)
