"""`ttt-adapt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt_adapt.cli.options import Device, Overwrite, Seed, Settings, parse_settings, pick_device
from ttt_adapt.cli.output import console, say


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ttt-adapt-demo"),
    frames: Annotated[int, typer.Option(min=2, help="Length of the stream.")] = 240,
    seed: Seed = 0,
    arm: Annotated[str, typer.Option(help="What runs beside the model as trained, such as online.")] = "calibrated",
    settings: Settings = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Watch a small model adapt to a street that drifts to night, fog and rain, and back each time."""
    from ttt_adapt.arms import find_arm
    from ttt_adapt.config import StreamConfig
    from ttt_adapt.evaluation.captions import gain_note
    from ttt_adapt.evaluation.demo import run_demo
    from ttt_adapt.evaluation.tables import rich_table

    changes = parse_settings(settings)
    config = StreamConfig.online(**changes) if changes else None
    report = run_demo(out, frames, seed, config, pick_device(device), arm, overwrite)
    console.print(rich_table(report, width=console.width))
    say(gain_note(report, find_arm(arm).name, "fixed"))
    say(f"side-by-side video: {out / 'demo.mp4'}\nits frame at night: {out / 'demo.png'}")
    say(f"mIoU over time: {out / 'stream.png'}")
