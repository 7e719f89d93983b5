"""No command writes over a file or a folder unasked, and all have the same option for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import ttt_adapt.training.recipe as recipe
from arm_inputs import checkpoint, frames, write_clip
from command_line import TRAIN, fail, invoke
from ttt_adapt.cli.app import app
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.demo import run_demo
from ttt_adapt.tasks.calibrate import SourceStills, calibrate_checkpoint
from ttt_adapt.tasks.checkpoint import load_checkpoint, read_calibration, save_checkpoint

QUICK = [*TRAIN, "--recipe=main", "--no-calibrate"]


@pytest.mark.parametrize("command", ["demo", "train", "calibrate", "run", "eval"])
def test_every_command_that_writes_has_the_option(command):
    assert "--overwrite" in invoke(command, "--help")


def never(monkeypatch, module, name: str) -> None:
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was done"))


def test_train_refuses_a_checkpoint_that_is_there_before_any_work(tmp_path, capsys, monkeypatch):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    with monkeypatch.context() as patch:
        never(patch, recipe, "_open_stills")
        line = fail(capsys, monkeypatch, "train", *QUICK, f"--out={out}")
    assert f"--out is {out}, which exists: choose another name, or set --overwrite to replace it" in line
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(out.name, b"precious")]
    text = invoke("train", *QUICK, f"--out={out}", "--overwrite")
    assert load_checkpoint(out).spec.size == (64, 96)
    assert f"wrote {out}\nnext: ttt-adapt calibrate {out} STILLS\n" in text  # it has no branch
    assert "training stills; `ttt-adapt eval` scores it on clips" in text
    assert "mIoU " in text


@pytest.mark.parametrize("name", ["m.safetensors", "m [final].safetensors"])
def test_the_state_of_an_interrupted_training_is_dropped_by_overwrite_alone(name, tmp_path, capsys, monkeypatch):
    out = tmp_path / name

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_checkpoint", stop)
        with pytest.raises(SystemExit):
            app([*map(str, ["train", *QUICK, f"--out={out}"])])
    capsys.readouterr()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert list(kept) == [f"{out.stem}.1-main.state"] or len(kept) == 2
    line = fail(capsys, monkeypatch, "train", *QUICK, f"--out={out}")
    assert "keeps an interrupted run: set --resume to go on with it, or --overwrite to train anew" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    invoke("train", *QUICK, f"--out={out}", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def calibrated(tmp_path) -> Path:
    made = checkpoint()
    calibrate_checkpoint(made, SourceStills([frame for frame, _ in frames(9)]), choose=False)
    save_checkpoint(tmp_path / "m.safetensors", made)
    return tmp_path / "m.safetensors"


def test_calibrate_refuses_to_replace_a_calibration_or_another_checkpoint(calibrated, tmp_path, capsys, monkeypatch):
    write_clip(tmp_path / "clips" / "a", 10, seed=4)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"precious")
    before, first = calibrated.read_bytes(), read_calibration(calibrated)
    call = ["calibrate", calibrated, tmp_path / "clips", "--no-choose"]
    line = fail(capsys, monkeypatch, *call)
    assert "is calibrated already, on 9 stills: set --overwrite to replace this calibration, or name another" in line
    assert "which exists: choose another name, or set --overwrite" in fail(capsys, monkeypatch, *call, f"--out={other}")
    assert (calibrated.read_bytes(), other.read_bytes()) == (before, b"precious")
    invoke(*call, f"--out={other}", "--overwrite")
    assert calibrated.read_bytes() == before
    invoke(*call, "--overwrite")
    assert read_calibration(calibrated).digest == read_calibration(other).digest != first.digest


def test_the_demo_refuses_a_folder_that_is_not_empty(tmp_path, capsys, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.mp4").write_bytes(b"precious")
    line = fail(capsys, monkeypatch, "demo", f"--out={tmp_path / 'demo'}", "--frames=4")
    assert "which is not empty: choose another folder, or set --overwrite" in line
    with pytest.raises(ConfigError, match="set `overwrite`"):
        run_demo(tmp_path / "demo", 4, 0)
    with pytest.raises(ConfigError, match="a file; expected a folder"):
        run_demo(tmp_path / "demo" / "demo.mp4", 4, 0, overwrite=True)
    assert [path.read_bytes() for path in (tmp_path / "demo").iterdir()] == [b"precious"]


@pytest.mark.usefixtures("committed")
def test_eval_starts_anew_only_when_asked_and_never_among_other_files(tmp_path, capsys, monkeypatch):
    write_clip(tmp_path / "clips" / "a", 2)
    save_checkpoint(tmp_path / "m.safetensors", checkpoint())
    out = tmp_path / "eval"
    call = ["eval", tmp_path / "clips", f"--checkpoint={tmp_path / 'm.safetensors'}", "--arms=fixed"]
    invoke(*call, f"--out={out}")
    before = (out / "report.json").read_bytes()
    line = fail(capsys, monkeypatch, *call, f"--out={out}", "--seeds=1")
    assert "of other settings (config, seeds): choose another folder, or set --overwrite" in line or "(seeds)" in line
    assert (out / "report.json").read_bytes() == before
    invoke(*call, f"--out={out}", "--seeds=1", "--overwrite")
    assert (out / "report.json").read_bytes() != before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "table.md").write_bytes(b"precious")
    assert "which is not empty" in fail(capsys, monkeypatch, *call, f"--out={tmp_path / 'photos'}")
    assert [path.read_bytes() for path in (tmp_path / "photos").iterdir()] == [b"precious"]
