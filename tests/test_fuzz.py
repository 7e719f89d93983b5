"""Damaged files and states end in an error of the library, or are taken whole; no process ends by them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parents[1] / "benchmarks" / "fuzz" / "run.py"


@pytest.mark.parametrize(
    ("kind", "count"),
    [("states", 300), ("checkpoints", 300), ("calibrations", 60), ("training", 40), ("reports", 100)],
)
def test_damage_ends_in_an_error_of_the_library_or_is_taken_whole(kind, count):
    pytest.importorskip("timm")
    done = subprocess.run([sys.executable, FUZZER, kind, "--count", str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert sum(int(number) for number, _ in outcomes) == count
    assert "refused" in [outcome for _, outcome in outcomes]
