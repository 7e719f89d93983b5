"""The command line as tests call it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner

from ttt_adapt.cli import app
from ttt_adapt.cli.output import console

console.width = 200  # rich looks at the environment once, when the first command is imported
DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CAMVID, CLIP = DATA / "camvid", DATA / "clips" / "intel_car-detection.mp4"
needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no CamVid clips in {DATA}")
needs_clip = pytest.mark.skipif(not CLIP.is_file(), reason=f"no {CLIP.name} in {CLIP.parent}")

SCRIPT = Path(sys.executable).with_name("ttt-adapt")
TINY = [f"--encoder-option={option}" for option in ("depth=2", "embed_dim=48", "num_heads=3")]
TRAIN = ["street", *TINY, "--stills=6", "--size=64x96", "--batch-size=3", "--first-epochs=1", "--epochs=1", "--seed=3"]


def invoke(*arguments: object) -> str:
    """Run a command that has to succeed; returns what it printed."""
    result = CliRunner().invoke(app.app, [str(a) for a in arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def status(monkeypatch, *arguments: object) -> int:
    """Run the console script's function; returns its exit status."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["ttt-adapt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
    return stop.value.code or 0


def fail(capsys, monkeypatch, *arguments: object) -> str:
    """Run the console script's function with bad input; returns its one line of error."""
    code = status(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert code == 1, captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def video(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Number of frames, rate and (height, width), by decoding the file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        sizes = [(frame.height, frame.width) for frame in container.decode(stream)]
        assert len(set(sizes)) == 1
        return len(sizes), float(stream.average_rate), sizes[0]
