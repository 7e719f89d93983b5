"""`ttt-adapt serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttt_adapt.cli.options import Device, Preset, Seed, Settings, parse_settings, parse_size, pick_device, preset_config
from ttt_adapt.errors import ConfigError

LIMITS = "Limits"
SOURCES = "Sources that the server reads"


def serve(
    checkpoint: Annotated[Path, typer.Option(help="A file of `ttt-adapt train`.")] = Path("model.safetensors"),
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token of clients; by default $TTT_ADAPT_TOKEN, if it is set.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size for the model; 'native' for the frames' own.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Streams that are open.")] = 16,
    queue: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Calls that wait for the model.")] = 32,
    rate: Annotated[
        float | None, typer.Option(rich_help_panel=LIMITS, help="Frames a second of one stream; by default no limit.")
    ] = None,
    frame_mb: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="MB of one picture as it comes.")
    ] = 16.0,
    state_mb: Annotated[float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="MB of a saved state.")] = 1024.0,
    sources: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", rich_help_panel=SOURCES, help="Clients may name files in this folder."),
    ] = None,
    source_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", rich_help_panel=SOURCES, help="Clients may name addresses below this one; repeatable."
        ),
    ] = None,
    preset: Preset = "online",
    arm: Annotated[
        str | None, typer.Option(help="Any adapting arm instead of a preset: calibrated, tent, self-train, ...")
    ] = None,
    settings: Settings = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Serve a trained model over HTTP: many streams, each adapts on its own."""
    from ttt_adapt.evaluation.calibrated import chosen_settings
    from ttt_adapt.serve.limits import Limits
    from ttt_adapt.serve.server import read_token
    from ttt_adapt.serve.server import serve as run_server

    changes = parse_settings(settings)
    if arm is not None and preset != "online":
        raise ConfigError(f"--preset {preset} and --arm {arm} both say what runs: give one of them")
    tuned = chosen_settings(checkpoint, changes) if arm is None and preset == "online" else {}
    run_server(
        checkpoint,
        host=host,
        port=port,
        token=read_token(token_file),
        size="native" if size == "native" else parse_size(size),
        limits=Limits(
            streams=streams, queue=queue, rate=rate,
            frame_bytes=int(frame_mb * 1e6), state_bytes=int(state_mb * 1e6),
        ),
        sources=sources,
        source_url=source_url or (),
        config=preset_config(preset, **{**tuned, "seed": seed, **changes}),
        arm=arm,
        changes=changes,
        device=pick_device(device),
    )  # fmt: skip
