"""Faults of every kind, injected into several streams, crash nothing, are accounted for and touch no other stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "faults.py"


def test_60_faults_in_three_streams_are_accounted_for_and_leave_the_fourth_as_it_was(tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, BENCHMARK, "--faults", "60", "--streams", "3", "--untouched", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"faults": 60' in out.read_text()
    assert '"accounted": 60' in out.read_text()
    assert '"untouched_equal": true' in out.read_text()
