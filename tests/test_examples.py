"""Every example runs and shows what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SHOWS = {
    "calibrate_your_camera.py": ["16 stills of (96, 128)", "frame   0: drift", "frame  11: drift", "unlike the stills"],
    "stream_timm_classifier.py": ["frame   0: class", "frame   7: class"],
    "joint_finetune_custom_head.py": ["epoch 6/6: main loss", "frame  9:"],
    "own_model_unet.py": ["the model has the same keys: True", "predicts as before: True"],
    "save_and_resume_stream.py": ["bit for bit: True"],
    "custom_optimizer_and_config.py": ["decoder_no_decay", "frame 1: best class", "every", "refused: window is 0"],
}


SERVED = {"serve_client.py"}
"""Needs a server: `tests/serve/test_process.py` runs it."""


def test_every_example_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SHOWS) | SERVED


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_example(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", str(FOLDER / name)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for text in SHOWS[name]:
        assert text in done.stdout
    assert not list(tmp_path.iterdir())
