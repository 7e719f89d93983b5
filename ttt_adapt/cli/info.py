"""`ttt-adapt info`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ttt_adapt.cli.options import (
    BranchSettings,
    Device,
    Settings,
    Size,
    branch_keywords,
    parse_settings,
    parse_size,
    pick_device,
    preset_config,
)
from ttt_adapt.cli.output import console


def info(
    model: Annotated[str, typer.Argument(help="timm model name, or a checkpoint.")],
    encoder: Annotated[
        str, typer.Option(help="Dotted path of the module where the encoder ends; auto finds it.")
    ] = "auto",
    branch: BranchSettings = None,
    size: Size = None,
    settings: Settings = None,
    device: Device = "auto",
) -> None:
    """Show what would be adapted in a model and what a step costs."""
    from ttt_adapt.evaluation.model_info import inspect_model

    found = inspect_model(
        model,
        encoder=encoder,
        size=parse_size(size),
        attach=branch_keywords(branch),
        config=preset_config("online", **parse_settings(settings)),
        device=pick_device(device),
    )
    table = Table(title=escape(model), show_header=False)
    for what, value in found.rows:
        table.add_row(what, escape(value))
    console.print(table)
