"""`ttt-adapt run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt_adapt.cli.options import (
    Device,
    Overwrite,
    Preset,
    Seed,
    Settings,
    TestBranch,
    parse_settings,
    parse_size,
    pick_device,
    preset_config,
)
from ttt_adapt.cli.output import say
from ttt_adapt.errors import ConfigError


def run(
    video: Annotated[str, typer.Argument(help="Video file, folder of frames, camera index, or URL.")],
    checkpoint: Annotated[Path, typer.Option(help="A file of `ttt-adapt train`.")] = Path("model.safetensors"),
    out: Annotated[
        Path | None,
        typer.Option(help="The mp4 to write; by default out.mp4, and none with --labels-out or --raw-out."),
    ] = None,
    labels_out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write label maps: a palette PNG of class ids for each frame."),
    ] = None,
    raw_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write what the model returns, such as class scores: an npz file for each frame."
        ),
    ] = None,
    overwrite: Overwrite = False,
    task: Annotated[str | None, typer.Option(help="What the checkpoint is for; it knows itself.")] = None,
    view: Annotated[str, typer.Option(help="overlay, or panels (frame, fixed, adapted, reconstruction).")] = "overlay",
    legend: Annotated[bool, typer.Option("--legend", help="Name the classes in a strip below the film.")] = False,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size for the model; 'native' for the video's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of the mp4; by default the video's own, 25 for a folder.")
    ] = None,
    preset: Preset = "online",
    arm: Annotated[
        str | None,
        typer.Option(help="Any streaming arm instead of a preset: fixed, calibrated, norm-blend, tent, ..."),
    ] = None,
    settings: Settings = None,
    branch: TestBranch = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Adapt a trained model to a video, frame by frame, and write what it sees."""
    from ttt_adapt.evaluation.adapt_video import adapt_video
    from ttt_adapt.evaluation.calibrated import chosen_settings
    from ttt_adapt.view.terminal import counted

    changes = parse_settings(settings)
    if arm is not None and preset != "online":
        raise ConfigError(f"--preset {preset} and --arm {arm} both say what runs: give one of them")
    tuned = chosen_settings(checkpoint, changes) if arm is None and preset == "online" else {}
    film = Path("out.mp4") if out is None and labels_out is None and raw_out is None else out
    count = adapt_video(
        video,
        checkpoint,
        film,
        labels_out=labels_out,
        raw_out=raw_out,
        overwrite=overwrite,
        task=task,
        view=view,
        legend=legend,
        size="native" if size == "native" else parse_size(size),
        limit=limit,
        fps=fps,
        config=preset_config(preset, **{**tuned, "seed": seed, **changes}),
        arm=arm,
        changes=changes,
        branch=parse_settings(branch, "mask_ratio=0.75"),
        device=pick_device(device),
    )
    for written, what in ((film, ""), (labels_out, ", as label maps"), (raw_out, ", as raw outputs")):
        if written is not None:
            say(f"wrote {counted(count, 'frame')} to {written}{what}")
