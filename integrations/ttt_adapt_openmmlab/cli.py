"""`ttt-adapt mm train|test`: MMEngine's own runner on a config."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train and test OpenMMLab configs.")


@app.command()
def train(config: str) -> None:
    """Train by a config."""
    raise NotImplementedError(config)


@app.command()
def test(config: str) -> None:
    """Test by a config."""
    raise NotImplementedError(config)
