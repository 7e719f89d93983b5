"""`ttt-adapt eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt_adapt.cli.options import (
    Device,
    Overwrite,
    Preset,
    TestBranch,
    parse_arm_settings,
    parse_classes,
    parse_forwards,
    parse_names,
    parse_seeds,
    parse_settings,
    parse_size,
    pick_device,
    preset_config,
)
from ttt_adapt.cli.output import console, say
from ttt_adapt.errors import ConfigError

DRIFTS = (
    "night", "noise", "fog", "rain", "blur", "motion-blur", "jpeg", "low-contrast", "white-balance", "exposure-flicker",
)  # fmt: skip
"""Those of `ttt_adapt.data.drift`, which loads torch."""


def evaluate(
    data: Annotated[
        str, typer.Argument(help="Folder of labelled clips (of colorization, pictures or videos), or 'street'.")
    ],
    checkpoint: Annotated[list[Path], typer.Option(help="Jointly trained checkpoint; repeat it, one per seed.")],
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint trained for the main task alone; one per seed.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated arms; by default fixed, calibrated (where there is a calibration), no-memory, "
            "implicit, explicit, online."
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="memory, window, smoothness, iterations or mask-ratio, instead of --arms.")
    ] = None,
    clips: Annotated[str, typer.Option(help="Comma-separated names of the clips; all by default.")] = "",
    format: Annotated[str, typer.Option(help="auto, folder, davis, kitti-step, cityscapes or coco.")] = "auto",
    classes: Annotated[str, typer.Option(help="Comma-separated class names, where the data bring none.")] = "",
    drift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SEVERITY]",
            help=f"Show every clip under drifts, comma-separated or repeated: {', '.join(DRIFTS)} or none. Severities "
            "are 1 (mild) to 5 (extreme); 3 by default. none..night:3..none lets the night come and go.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the frames; the checkpoint's by default, or 'native'.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of adaptation.")] = "0",
    seed: Annotated[int | None, typer.Option(min=0, help="Which street, for 'street'; 0 by default.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the stream, for 'street'; 240.")] = None,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="An arm misses the frames that go by while it is busy.")
    ] = False,
    forwards: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM=R", help="Forward passes per frame for --real-time; measured by default."),
    ] = None,
    metric_weights: Annotated[
        Path | None, typer.Option(help="Folder with the networks of LPIPS, FID and Inception Score; never downloaded.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, table.md and plots.")] = Path("ttt-adapt-eval"),
    overwrite: Overwrite = False,
    preset: Preset = "online",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[ARM.]NAME=VALUE",
            help="Change a field of StreamConfig, for all arms or one of them (tent.lr=1e-3); repeatable.",
        ),
    ] = None,
    branch: TestBranch = None,
    device: Device = "auto",
) -> None:
    """Compare arms on clips: tables, a JSON and plots."""
    from ttt_adapt.data.drift import parse_drifts
    from ttt_adapt.evaluation.calibrated import default_arms
    from ttt_adapt.evaluation.rows import clips_from, rows_of, unheeded
    from ttt_adapt.evaluation.session import check_failures
    from ttt_adapt.evaluation.session import evaluate as evaluate_rows
    from ttt_adapt.evaluation.studies import find_study, rows_of_study
    from ttt_adapt.evaluation.tables import rich_table
    from ttt_adapt.tasks.checkpoint import read_spec
    from ttt_adapt.view.terminal import notice

    if study is not None and (arms is not None or baseline):
        raise ConfigError("--study brings its own rows: leave out --arms and --baseline")
    drifts = parse_drifts(drift or ())
    chosen = None if study is None else find_study(study)
    common, own = parse_arm_settings(settings)
    if chosen is not None and own:
        raise ConfigError(
            f"--set {next(iter(own))}.…: a study brings its own rows; --set NAME=VALUE changes all of them"
        )
    hidden = parse_settings(branch, "mask_ratio=0.75")
    numbers = parse_seeds(seeds, checkpoint, baseline or [])
    names = parse_names(arms) if arms is not None else () if chosen else default_arms(checkpoint)
    rows = [] if chosen else rows_of(names, checkpoint, baseline or [], own, hidden)
    charged = parse_forwards(real_time, forwards, chosen.arms if chosen else names)
    spec = read_spec(checkpoint[0])
    found = clips_from(
        data,
        parse_names(clips),
        parse_size(size) if size else spec.size,
        format=format,
        classes=parse_classes(classes),
        default_classes=spec.classes,
        seed=seed,
        frames=frames,
        task=spec.task,
        drifts=drifts,
    )
    rows = rows_of_study(chosen, found, checkpoint, hidden) if chosen else rows
    config = preset_config(preset, **common)
    for field, arms_with in unheeded(rows, config, common).items():
        own_values = ", ".join(f"{arm} has {field}={value!r}" for arm, value in arms_with.items())
        notice(f"--set {field}={common[field]!r} does not change every arm: {own_values}")
    report = evaluate_rows(
        rows,
        found,
        config,
        numbers,
        out,
        pick_device(device),
        real_time=charged,
        study=chosen,
        metric_weights=metric_weights,
        overwrite=overwrite,
    )
    console.print(rich_table(report, width=console.width))
    say(f"report, tables and plots: {out}")
    check_failures(report, out)
