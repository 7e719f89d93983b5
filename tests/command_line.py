"""Running the command line as a user does, and what its tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ttt_adapt.cli import app as cli

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLIP = DATA / "clips" / "intel_car-detection.mp4"
needs_clip = pytest.mark.skipif(not CLIP.is_file(), reason=f"no {CLIP.name} in {CLIP.parent}")

TINY = [f"--encoder-option={option}" for option in ("depth=2", "embed_dim=48", "num_heads=3")]


def invoke(*arguments: object) -> str:
    """Run a command that has to succeed; returns what it printed."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(capsys, monkeypatch, *arguments: object) -> str:
    """Run the console script's function with bad input; returns its one line of error."""
    monkeypatch.setattr(sys, "argv", ["ttt-adapt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 1, captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err
