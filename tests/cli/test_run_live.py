"""`ttt-adapt run` on a live source: limits, accounts, another size, and no secret in anything that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arm_inputs import checkpoint
from command_line import fail, invoke, video
from live_server import Camera, answer, frames, stall
from ttt_adapt.tasks.checkpoint import save_checkpoint

LEVELS = list(range(0, 200, 20))
SECRETS = ("viewer", "geheim", "t0psecret")
LIMITS = ["--keep=every", "--read-timeout=0.2", "--open-timeout=3", "--tries=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_checkpoint(file, checkpoint())
    return file


def test_a_run_goes_on_after_a_stall_begins_anew_at_another_size_and_accounts_for_all_frames(model, tmp_path):
    with Camera(frames(LEVELS, stall), frames(LEVELS, stall, size=(32, 80))) as camera:
        told = invoke(
            "run", camera.url, f"--checkpoint={model}", *LIMITS, f"--out={tmp_path / 'o.mp4'}",
            f"--raw-out={tmp_path / 'raw'}", "--limit=20", "--set=window=2", "--set=every=2", "--set=guards=False",
        )  # fmt: skip
    assert "is lost: no frame for 0.2 s" in told
    assert "a new video begins" in told
    assert video(tmp_path / "o.mp4")[::2] == (20, (48, 64))  # the film keeps its size
    shapes = [np.load(tmp_path / "raw" / f"{index:06d}.npz")["output"].shape[1:] for index in (9, 10)]
    assert shapes == [(48, 64), (48, 128)]  # the model sees the aspect of each
    about = json.loads((tmp_path / "raw" / "run.json").read_text())["frames_of_source"]
    assert {name: about[name]["frames"] for name in ("taken", "dropped", "adapted", "predicted")} == {
        "taken": 20, "dropped": 0, "adapted": 10, "predicted": 20,
    }  # fmt: skip
    assert about["resized"] == 1
    assert about["lost"] >= 1  # the second stall may be noticed before the last frame is predicted
    assert " 0 dropped, 10 adapted to, 20 predicted (" in told


def test_the_fixed_model_adapts_to_no_frame(model, tmp_path):
    with Camera(frames(LEVELS, stall)) as camera:
        told = invoke("run", camera.url, f"--checkpoint={model}", "--arm=fixed", *LIMITS, "--limit=4",
                      f"--raw-out={tmp_path / 'raw'}")  # fmt: skip
    assert " 0 adapted to, 4 predicted (" in told


def test_nothing_that_a_run_prints_or_writes_has_a_secret(model, tmp_path, monkeypatch, capsys):
    sources = (frames(LEVELS, stall), answer("401 No"))
    with Camera(*sources, login="viewer:geheim@", query=f"?token=t0psecret{'x' * 300}") as camera:
        outputs = [
            f"--out={tmp_path / 'o.mp4'}",
            f"--raw-out={tmp_path / 'raw'}",
            f"--labels-out={tmp_path / 'labels'}",
        ]
        error = fail_after_output(
            capsys, monkeypatch, "run", camera.url, f"--checkpoint={model}", "--arm=fixed", *LIMITS, *outputs
        )
    assert "is lost at frame 10" in error
    assert "--tries sets when it is given up" in error
    for wrong in (
        "rtsp:/viewer:geheim@cam/x?token=t0psecret",
        "viewer:geheim@cam/x",
        "nope://viewer:geheim@cam/t0psecret?t0psecret",
    ):
        error += fail(capsys, monkeypatch, "run", wrong, f"--checkpoint={model}", f"--raw-out={tmp_path / 'none'}")
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20
    assert b"***@127.0.0.1" in b"".join(written)
    for secret in SECRETS[:2]:
        assert secret not in error
        assert not any(secret.encode() in data for data in written)
    assert "t0psecret" not in error.replace("cam/t0psecret", "")  # a path is no secret
    assert not any(b"t0psecret" in data for data in written)


def fail_after_output(capsys, monkeypatch, *arguments: object) -> str:
    """What a run that ends in an error prints."""
    from command_line import status

    assert status(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["rtsp://viewer:geheim@cam/x?t=t0psecret"],
        ["run", "a.mp4", "rtsp://viewer:geheim@cam/x?t=t0psecret"],
        ["run", "a.mp4", "--tries=rtsp://viewer:geheim@cam/x?t=t0psecret"],
    ],
)
def test_an_address_in_a_wrong_place_is_told_without_its_secrets(arguments, monkeypatch, capsys):
    from command_line import status

    assert status(monkeypatch, *arguments)
    told = "".join(capsys.readouterr())
    assert "rtsp://***@cam" in told
    assert not [secret for secret in SECRETS if secret in told]


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("--tries=often", "--tries is 'often'; expected a whole number, or forever"),
        ("--tries-at-start=0", "--tries-at-start is 0; expected a whole number of at least 1"),
        ("--max-silence=0", "--max-silence is 0.0; expected a number of seconds above 0"),
        ("--read-timeout=nan", "--read-timeout is nan; expected"),
        ("--keep=all", "--keep is 'all'; expected newest or every"),
        ("--on-resize=scale", "--on-resize is 'scale'; expected reset or error"),
    ],
)
def test_wrong_limits_are_refused_by_the_names_of_their_options(option, match, model, tmp_path, monkeypatch, capsys):
    source = tmp_path / "in"
    source.mkdir()
    from PIL import Image

    Image.new("RGB", (64, 48)).save(source / "a.png")
    error = fail(capsys, monkeypatch, "run", source, f"--checkpoint={model}", f"--raw-out={tmp_path / 'raw'}", option)
    assert match in error
    assert not (tmp_path / "raw").exists()
