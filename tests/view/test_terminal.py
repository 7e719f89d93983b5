"""A progress bar fits the terminal, and its rate counts what this run did."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import rich.progress
from rich.console import Console

from ttt_adapt.view.terminal import notice, progress_bar, rewording


@pytest.fixture
def lines(monkeypatch):
    """Makes progress bars on a terminal of a width; returns the function that shows the last line of them."""

    def shown(width: int, title: str, total: int | None, note: object, unit: str = "step", done: int = 0) -> str:
        terminal = io.StringIO()
        console = Console(file=terminal, width=width, height=20, force_terminal=True, color_system=None)
        real, clock = rich.progress.Progress, itertools.count(0.0)  # a second goes by with every look at it
        options = {"console": console, "get_time": lambda: next(clock)}
        with monkeypatch.context() as patch:
            patch.setattr(rich.progress, "Progress", lambda *a, **k: real(*a, **k, **options))
            with progress_bar(title, total, unit, done) as advance:
                for _ in range(3):
                    advance(note)
        return re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.getvalue()).splitlines()[-1].split("\r")[-1]

    return shown


TRAINING = "epoch 12/40  main 0.1234  mae 0.5678"


@pytest.mark.parametrize(
    ("title", "total", "note", "parts"),
    [
        ("train joint", 2000, TRAINING, ["train joint", "   3/2000", "/s", TRAINING]),
        ("a_video_of_a_camera_2026-11-29_08-15-00.mp4", 37500, 0.1234, ["a_video_of", "    3/37500", "loss 0.1234"]),
        ("Online TTT-MAE on street-0 none..night:3..none, seed 0", 240, "this frame: mIoU 0.123", ["  3/240", "0.123"]),
        ("camera 0", None, 0.5, ["camera 0", "3/?", "loss 0.5000"]),
    ],
)
def test_a_progress_bar_shows_all_of_its_numbers_in_80_columns(lines, title, total, note, parts):
    line = lines(80, title, total, note)
    assert len(line) <= 80
    for part in parts:
        assert part in line
    assert re.search(r"\d\.\d/s ", line)


def test_a_wide_terminal_says_what_the_rate_counts(lines):
    assert re.search(r"\d\.\d frames/s ", lines(160, "a" * 60, 10, None, "frame"))


def test_what_an_earlier_run_did_counts_as_done_and_not_into_the_rate(lines):
    line = lines(80, "train joint", 2000, TRAINING, done=1500)
    assert "1503/2000" in line
    assert float(re.search(r"(\d+\.\d)/s", line)[1]) <= 3.0


@pytest.mark.parametrize("name", ["[red]x.mp4", "[/].mp4", "cam:car:1.mp4"])
def test_names_are_shown_as_they_are(name, lines, capfd):
    notice(f"{name} is in colour")
    assert capfd.readouterr().err == f"{name} is in colour\n"
    assert name in lines(120, name, 10, None)


def test_notices_inside_the_block_are_reworded(capfd):
    with rewording(str.upper):
        notice("inside [bold]")
    notice("outside")
    assert capfd.readouterr().err == "INSIDE [BOLD]\noutside\n"
