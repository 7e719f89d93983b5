"""`evaluate`: what a result may depend on, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import ttt_adapt.evaluation.session as command
from arm_inputs import CLASSES, CONFIG, VIT, checkpoint, frames
from ttt_adapt.arms import ARMS
from ttt_adapt.data import open_clips
from ttt_adapt.errors import CheckpointError, ConfigError, DataError
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.runner import run_arm
from ttt_adapt.evaluation.session import Contender, evaluate
from ttt_adapt.tasks.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("committed")


@pytest.fixture
def clips(tmp_path) -> list:
    root = tmp_path / "data"
    for number, name in enumerate(("dusk", "noon")):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for index, (frame, labels) in enumerate(frames(3, seed=number)):
            Image.fromarray(frame).save(root / name / "images" / f"{index}.png")
            Image.fromarray(labels).save(root / name / "labels" / f"{index}.png")
    index = {"classes": CLASSES, "ignore": 255, "clips": [{"clip": "dusk"}, {"clip": "noon"}]}
    (root / "index.json").write_text(json.dumps(index))
    return open_clips(root)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"model{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_checkpoint(path, checkpoint(seed))
    return paths


def contenders(files) -> list[Contender]:
    return [Contender("fixed", "Fixed", tuple(files)), Contender("online", "Online", tuple(files))]


def results(report: Report) -> list:
    return [(run.arm, run.clip, run.seed, run.miou, run.losses) for run in report.runs]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The runs that are really made."""
    made = []

    def run(arm, *args, **keywords):
        made.append(f"{arm.name} {keywords['name']}")
        return run_arm(arm, *args, **keywords)

    monkeypatch.setattr(command, "run_arm", run)
    return made


def test_evaluate_runs_every_row_on_every_clip_with_every_seed_and_writes_it_down(tmp_path, clips, files):
    out = tmp_path / "out"
    report = evaluate(contenders(files[:1]), clips, CONFIG, [0, 1], out)
    assert {(run.arm, run.clip, run.seed) for run in report.runs} == {
        (arm, clip, seed) for arm in ("Fixed", "Online") for clip in ("dusk", "noon") for seed in (0, 1)
    }
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "miou.png", "dusk.png", "noon.png"}
    assert results(Report.load(out / "report.json")) == results(report)
    table = (out / "table.md").read_text()
    assert "| Online |" in table
    assert "dusk: mIoU (%)" in table
    for name in ("miou", "dusk", "noon"):
        assert min(Image.open(out / f"{name}.png").size) > 300


def test_each_seed_has_its_own_checkpoint(tmp_path, clips, files):
    report = evaluate(contenders(files), clips[:1], CONFIG, [0, 1], tmp_path / "out")
    for seed, file in enumerate(files):
        run = run_arm(
            ARMS["online"],
            command.load_checkpoint(file),
            clips[0],
            CONFIG.replace(seed=seed),
            name="dusk",
            label="Online",
        )
        ours = next(r for r in report.runs if r.arm == "Online" and r.seed == seed)
        assert (ours.miou, ours.losses) == (run.miou, run.losses)


def test_a_second_call_runs_nothing_again(tmp_path, clips, files, counted):
    config = CONFIG.replace(crop_size=(32, 32))
    first = evaluate(contenders(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    again = evaluate(contenders(files), clips, config, [0], tmp_path / "out")
    assert len(counted) == 4
    assert results(again) == results(first)


def test_a_file_where_the_results_should_go_is_refused_and_stays(tmp_path, clips, files):
    before = files[0].read_bytes()
    with pytest.raises(ConfigError, match="a file; expected a folder"):
        evaluate(contenders(files[:1]), clips, CONFIG, [0], files[0])
    assert files[0].read_bytes() == before


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, clips, files, counted, monkeypatch):
    whole = evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "whole")
    counted.clear()
    real = command.run_arm

    def stop(*args, **keywords):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_arm", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "out")
    assert len(Report.load(tmp_path / "out" / "report.json").runs) == 2
    report = evaluate(contenders(files), clips, CONFIG, [0], tmp_path / "out")
    assert counted == ["fixed dusk", "fixed noon", "online dusk", "online noon"]
    assert results(report) == results(whole)


def test_results_of_other_settings_or_of_other_weights_are_not_mixed(tmp_path, clips, files, counted):
    evaluate(contenders(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    text = (tmp_path / "out" / "report.json").read_text()
    for changes in ({"config": CONFIG.replace(lr=0.5)}, {"seeds": [0, 1]}, {"clips": clips[:1]}):
        arguments = {"contenders": contenders(files[:1]), "clips": clips, "config": CONFIG, "seeds": [0], **changes}
        with pytest.raises(DataError, match="other settings"):
            evaluate(**arguments, out=tmp_path / "out")
    save_checkpoint(files[0], checkpoint(9))  # the same name, trained anew
    with pytest.raises(DataError, match="other settings"):
        evaluate(contenders(files[:1]), clips, CONFIG, [0], tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_text() == text
    assert len(counted) == 4


def test_what_does_not_fit_fails_before_anything_runs_or_is_written(tmp_path, clips, files, counted):
    save_checkpoint(tmp_path / "vit.safetensors", checkpoint(**VIT))
    save_checkpoint(tmp_path / "main.safetensors", checkpoint(branch=None))
    save_checkpoint(tmp_path / "other.safetensors", checkpoint(classes=("cat", "dog")))
    fixed = contenders(files[:1])[0]
    bad = [
        (Contender("norm-ema", "BN", (tmp_path / "vit.safetensors",)), ConfigError, "no BatchNorm"),
        (Contender("online", "O", (tmp_path / "main.safetensors",)), ConfigError, "main task alone"),
        (Contender("fixed", "F", (tmp_path / "other.safetensors",)), CheckpointError, "cat, dog; clip dusk has road"),
        (Contender("online", "O", (files[0], tmp_path / "none.safetensors")), CheckpointError, "no checkpoint"),
        (Contender("offlin", "O", (files[0],)), ConfigError, "no arm 'offlin'"),
    ]
    for contender, kind, match in bad:
        with pytest.raises(kind, match=match):
            evaluate([fixed, contender], clips, CONFIG, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not counted
