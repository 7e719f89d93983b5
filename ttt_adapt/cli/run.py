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
    parse_tries,
    pick_device,
    preset_config,
)
from ttt_adapt.cli.output import say
from ttt_adapt.errors import ConfigError

LIVE = "Cameras and streams"
RESTART = "Going on after a stop"


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
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="newest|every",
            rich_help_panel=LIVE,
            help="newest: drop frames that came meanwhile; every: wait. By default newest for cameras and streams.",
        ),
    ] = None,
    on_resize: Annotated[
        str | None,
        typer.Option(
            metavar="reset|error",
            rich_help_panel=LIVE,
            help="Another size of frames: a new video, or an error. By default reset for cameras and streams.",
        ),
    ] = None,
    tries: Annotated[
        str,
        typer.Option(metavar="N|forever", rich_help_panel=LIVE, help="Tries to open a lost one again; 0: none."),
    ] = "10",
    max_silence: Annotated[
        float | None,
        typer.Option(metavar="S", rich_help_panel=LIVE, help="Seconds without a frame until it is given up."),
    ] = None,
    tries_at_start: Annotated[
        str,
        typer.Option(metavar="N|forever", rich_help_panel=LIVE, help="Tries to open one before its first frame."),
    ] = "1",
    open_timeout: Annotated[
        float, typer.Option(metavar="S", rich_help_panel=LIVE, help="Seconds that opening may take.")
    ] = 10.0,
    read_timeout: Annotated[
        float, typer.Option(metavar="S", rich_help_panel=LIVE, help="Seconds without a frame after which it is lost.")
    ] = 10.0,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=RESTART, help="Keep the state of the run in a .safetensors file."),
    ] = None,
    state_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=RESTART, help="Frames between two states; by default 500."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=RESTART, help="Go on from --state; begin where there is none.")
    ] = False,
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
    from ttt_adapt.video import Reconnect
    from ttt_adapt.view.terminal import counted

    changes = parse_settings(settings)
    limits = Reconnect(
        tries=parse_tries("tries", tries),
        max_silence=max_silence,
        tries_at_start=parse_tries("tries_at_start", tries_at_start),
        open_timeout=open_timeout,
        read_timeout=read_timeout,
    )
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
        keep=keep,  # type: ignore[arg-type]
        on_resize=on_resize,  # type: ignore[arg-type]
        reconnect=limits,
        config=preset_config(preset, **{**tuned, "seed": seed, **changes}),
        arm=arm,
        changes=changes,
        branch=parse_settings(branch, "mask_ratio=0.75"),
        device=pick_device(device),
        state=state,
        state_every=state_every,
        resume=resume,
    )
    for written, what in ((film, ""), (labels_out, ", as label maps"), (raw_out, ", as raw outputs")):
        if written is not None:
            say(f"wrote {counted(count, 'frame')} to {written}{what}")
