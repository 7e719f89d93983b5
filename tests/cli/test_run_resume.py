"""`ttt-adapt run --state --resume`: a run that was stopped or killed goes on as if it had not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_inputs import checkpoint, write_clip
from command_line import fail, invoke, video
from ttt_adapt.evaluation.run_state import RunState
from ttt_adapt.tasks.checkpoint import save_checkpoint

KILL = Path(__file__).parents[2] / "benchmarks" / "kill.py"
PALETTE = ((10, 20, 30), (200, 0, 0), (0, 0, 250))
FRAMES = 7
FIXED = ("--arm=fixed", "--arm=norm-ema")
"""Arms that adapt no weights."""
SETTINGS = ("--set", "window=3", "--set", "batch_size=2", "--set", "lr=1e-2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "m.safetensors", checkpoint(palette=PALETTE))
    save_checkpoint(root / "other.safetensors", checkpoint(seed=1, palette=PALETTE))
    write_clip(root / "clip", FRAMES)
    write_clip(root / "another", FRAMES, seed=1)
    return root


def call(inputs: Path, out: Path, *more: object, model: str = "m", clip: str = "clip") -> list[object]:
    out.mkdir(exist_ok=True)
    return [
        "run", inputs / clip / "images", f"--checkpoint={inputs / model}.safetensors", "--size=native",
        f"--out={out / 'film.mp4'}", f"--labels-out={out / 'labels'}", f"--raw-out={out / 'raw'}",
        f"--state={out / 'state.safetensors'}", "--state-every=2", *(() if {*more} & {*FIXED} else SETTINGS), *more,
    ]  # fmt: skip


def results(out: Path) -> dict[str, bytes]:
    """Label maps and raw outputs, by name."""
    return {path.name: path.read_bytes() for name in ("labels", "raw") for path in (out / name).glob("*.[!j]*")}


def everything(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_runs_that_are_killed_at_random_moments_and_go_on_give_the_bits_of_one_that_was_not():
    done = subprocess.run(
        [sys.executable, KILL, "--moments=5", "--frames=12", "--every=3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 moments" in done.stdout
    assert done.stdout.rstrip().endswith(" 0 differences")


@pytest.mark.parametrize("arm", ["online", "norm-ema", "tent+class-2+smooth-3", "fixed"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits_in_all_targets(inputs, tmp_path, arm):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    invoke(*call(inputs, whole, f"--arm={arm}"))
    invoke(*call(inputs, parts, f"--arm={arm}", "--limit=3"))
    assert video(parts / "film.mp4")[0] == 3
    text = invoke(*call(inputs, parts, f"--arm={arm}", "--resume"))
    assert "goes on behind 3 frames" in text
    assert f"wrote {FRAMES} frames" in text
    assert results(parts) == results(whole)
    assert len(results(parts)) == 2 * FRAMES
    assert video(parts / "film.mp4") == video(whole / "film.mp4")
    assert {path.name for path in parts.iterdir()} == {"film.mp4", "labels", "raw", "state.safetensors"}
    about = json.loads((parts / "labels" / "run.json").read_text())
    assert (about["complete"], about["frames"]) == (True, FRAMES)
    assert about["frames_of_source"]["predicted"]["frames"] == FRAMES


def test_a_run_that_is_complete_has_nothing_left_to_do_and_changes_nothing_but_its_description(inputs, tmp_path):
    invoke(*call(inputs, tmp_path, "--resume"))  # there is no state yet, so it begins
    before = everything(tmp_path)
    assert f"wrote {FRAMES} frames" in invoke(*call(inputs, tmp_path, "--resume"))
    after = everything(tmp_path)
    assert {name for name in before if before[name] != after[name]} <= {"labels/run.json", "raw/run.json"}
    assert before.keys() == after.keys()


def test_a_video_of_labels_goes_on_too(inputs, tmp_path):
    import av

    def run(out: Path, *more: object) -> list[np.ndarray]:
        out.mkdir(exist_ok=True)
        invoke(
            "run", inputs / "clip" / "images", f"--checkpoint={inputs / 'm.safetensors'}", "--arm=fixed",
            f"--labels-out={out / 'labels.mkv'}", f"--state={out / 'state'}", "--state-every=2", *more,
        )  # fmt: skip
        with av.open(str(out / "labels.mkv")) as film:
            assert json.loads(film.metadata["CLASSES"])
            return [frame.to_ndarray() for frame in film.decode(video=0)]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--limit=5")
    parts = run(tmp_path / "parts", "--resume")
    assert len(whole) == len(parts) == FRAMES
    assert all(map(np.array_equal, whole, parts))


def test_what_is_newer_than_the_state_is_removed(inputs, tmp_path):
    invoke(*call(inputs, tmp_path, "--limit=3"))
    for name in ("labels/5.png", "raw/5.npz", "film.part-001.mp4", "labels/.5.png.123.part"):
        (tmp_path / name).write_bytes(b"newer")
    invoke(*call(inputs, tmp_path, "--resume", "--limit=4"))
    names = {"0", "1", "2", "3"}
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {*(f"{name}.png" for name in names), "run.json"}
    assert {path.stem for path in (tmp_path / "raw").glob("*.npz")} == names
    assert {path.name for path in tmp_path.glob("film*")} == {"film.mp4"}


@pytest.mark.parametrize(
    ("how", "more", "expected"),
    [
        ({"model": "other"}, [], "keeps the state of another run: it was saved with {'checkpoint'"),
        ({}, ["--set", "iterations=2"], "'iterations': 2"),
        ({}, ["--arm=tent"], "keeps the state of another run: it was saved with {'arm': None}"),
        ({}, ["--size=32x48"], "{'size': 'native'}"),
        ({}, ["--legend"], "{'legend': False}"),
        ({"clip": "another"}, [], "is of another video"),
        ({}, ["--overwrite"], "the one goes on with what is there, the other begins anew"),
    ],
)
def test_a_state_of_something_else_is_refused_before_anything_is_written(
    inputs, tmp_path, capsys, monkeypatch, how, more, expected
):
    invoke(*call(inputs, tmp_path, "--limit=3"))
    before = everything(tmp_path)
    capsys.readouterr()
    text = " ".join(fail_of(capsys, monkeypatch, *call(inputs, tmp_path, "--resume", *more, **how)))
    assert expected in text
    assert everything(tmp_path) == before


def fail_of(capsys, monkeypatch, *arguments: object) -> list[str]:
    """The error of a call, which may have notices before it."""
    from command_line import status

    assert status(monkeypatch, *arguments) == 1
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_frames_of_another_size_are_another_video(inputs, tmp_path, capsys, monkeypatch):
    invoke(*call(inputs, tmp_path / "out", "--limit=3"))
    (tmp_path / "small" / "images").mkdir(parents=True)
    for index in range(FRAMES):
        with Image.open(inputs / "clip" / "images" / f"{index}.png") as image:
            image.resize((32, 32)).save(tmp_path / "small" / "images" / f"{index}.png")
    (text,) = fail_of(capsys, monkeypatch, *call(inputs, tmp_path / "out", "--resume", clip=str(tmp_path / "small")))
    assert "is of another video" in text


@pytest.mark.parametrize("name", ["state.safetensors", "film.mp4", "labels/1.png", "raw/0.npz"])
def test_what_is_torn_or_gone_is_named_and_nothing_is_written(inputs, tmp_path, capsys, monkeypatch, name):
    invoke(*call(inputs, tmp_path, "--limit=3"))
    file = tmp_path / name
    if name == "state.safetensors":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    before = everything(tmp_path)
    capsys.readouterr()
    (text,) = fail_of(capsys, monkeypatch, *call(inputs, tmp_path, "--resume"))
    assert str(file) in text
    assert everything(tmp_path) == before


def test_a_state_that_is_there_is_not_written_over_unasked(inputs, tmp_path, capsys, monkeypatch):
    invoke(*call(inputs, tmp_path, "--limit=3"))
    capsys.readouterr()
    text = fail(capsys, monkeypatch, *call(inputs, tmp_path))
    assert "set --resume to go on with it, or --overwrite to begin anew" in text
    invoke(*call(inputs, tmp_path, "--overwrite", "--limit=1"))
    assert RunState.read(tmp_path / "state.safetensors").frames == 1
    assert len(results(tmp_path)) == 2
    (tmp_path / "state.safetensors").write_text("of somebody")
    text = fail(capsys, monkeypatch, *call(inputs, tmp_path, "--overwrite"))
    assert "is no state of a run: it is a text" in text


def test_options_that_need_a_state_or_exclude_it_say_so(inputs, tmp_path, capsys, monkeypatch):
    base = [
        "run",
        inputs / "clip" / "images",
        f"--checkpoint={inputs / 'm.safetensors'}",
        f"--raw-out={tmp_path / 'r'}",
    ]
    for more in ("--resume", "--state-every=5"):
        assert "no state file is named: name one with --state" in fail(capsys, monkeypatch, *base, more)
    assert "is no state of a run: it is a checkpoint" in fail(
        capsys, monkeypatch, *base, f"--state={inputs / 'm.safetensors'}", "--overwrite"
    )
