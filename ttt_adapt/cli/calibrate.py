"""`ttt-adapt calibrate`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ttt_adapt.cli.options import Device, Overwrite, Seed, parse_names, parse_size, pick_device
from ttt_adapt.cli.output import console, say
from ttt_adapt.errors import ConfigError

if TYPE_CHECKING:
    from ttt_adapt.model.calibration import Calibration


def calibrate(
    model: Annotated[Path, typer.Argument(help="A checkpoint of `ttt-adapt train`.")],
    stills: Annotated[
        str,
        typer.Argument(
            help="Ordinary scenes of the camera: a folder of labelled clips, pictures or videos, or a video file."
        ),
    ],
    count: Annotated[
        int, typer.Option("--stills", min=1, metavar="N", help="How many frames to take, evenly spaced.")
    ] = 40,
    clips: Annotated[str, typer.Option(help="Comma-separated names of the clips to use; all by default.")] = "",
    labels: Annotated[
        bool | None,
        typer.Option("--labels/--no-labels", help="Whether labels are used; by default where there are some."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Another checkpoint to write, .safetensors; by default MODEL is changed.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the frames; the checkpoint's by default, or 'native'.")
    ] = None,
    drifts: Annotated[
        str | None,
        typer.Option(metavar="NAME[:SEVERITY],...", help="Drifts that the rule is chosen on; six at 3 by default."),
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose/--no-choose", help="Choose the rule on these stills, or take the default.")
    ] = True,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Choose too how gradient steps are taken, on short streams; it takes minutes."),
    ] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Tell a trained model what its own ground looks like; it then corrects frames that look otherwise."""
    from ttt_adapt.calibration.calibrate import DRIFTS
    from ttt_adapt.data.drift import parse_drift
    from ttt_adapt.files import output_folder
    from ttt_adapt.tasks.calibrate import calibrate_checkpoint, calibration_target, open_stills
    from ttt_adapt.tasks.checkpoint import load_checkpoint, write_calibration

    chosen_on = DRIFTS if drifts is None else parse_names(drifts)
    if choose and not chosen_on:
        raise ConfigError("drifts is empty; expected at least one to choose on, or --no-choose")
    for drift in chosen_on:
        parse_drift(drift)  # it raises before anything is loaded
    target = calibration_target(model, out, overwrite)
    checkpoint = load_checkpoint(model, pick_device(device))
    output_folder(target)
    found = open_stills(
        checkpoint.spec,
        stills,
        count=count,
        names=parse_names(clips),
        size=parse_size(size) if size else checkpoint.spec.size,
        labels=labels,
    )
    started = time.perf_counter()
    calibration = calibrate_checkpoint(checkpoint, found, choose=choose, steps=steps, drifts=chosen_on, seed=seed)
    seconds = time.perf_counter() - started
    write_calibration(model, calibration, target)
    used = "with their labels" if found.labels is not None else f"without labels ({found.unlabelled})"
    say(f"calibrated on {calibration.stills} of {found.of} frames of {stills} {used}, in {seconds:.1f} s")
    _show(checkpoint.model, calibration)
    say(f"wrote {target}")
    say(f"next: ttt-adapt run VIDEO --checkpoint {shlex.quote(str(target))}")


def _show(model: object, calibration: Calibration) -> None:
    """What was measured, and the tables of the rules and of the settings that were tried."""
    from ttt_adapt.calibration.describe import (
        candidates_of,
        describe_calibration,
        describe_distance,
        in_columns,
        is_far,
        tried_settings,
    )
    from ttt_adapt.view.terminal import notice

    table = Table(show_header=False)
    for what, value in describe_calibration(calibration, model):  # type: ignore[arg-type]
        table.add_row(what, escape(value))
    console.print(table)
    tried = candidates_of(calibration)
    if tried:
        columns = ("corrects", "frames beyond", "own share up to", "under drifts", "without")
        table = Table(*columns, title="Rules that were tried, and what they do to the score", title_justify="left")
        for each in tried:
            style = "bold" if each.chosen else ""
            table.add_row(*in_columns(each.rule), f"{each.gain:+.1%}", f"{-each.loss:+.1%}", style=style)
        console.print(table)
    settings = tried_settings(calibration)
    if settings:
        title = "Settings of gradient steps that were tried, on short streams"
        table = Table("settings", "under drifts", "without", title=title, title_justify="left")
        for one in settings:
            style = "bold" if one.chosen else ""
            table.add_row(escape(one.words), f"{one.gain:+.1%}", f"{-one.loss:+.1%}", style=style)
        console.print(table)
    if is_far(calibration):
        notice(f"the stills are {describe_distance(calibration)}")
