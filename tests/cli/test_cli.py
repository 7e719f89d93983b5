"""The command line, as a user has it: from training to a written video, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ttt_adapt.evaluation.model_info as model_info
import ttt_adapt.training.recipe as recipe
from command_line import CAMVID, CLIP, SCRIPT, TINY, TRAIN, fail, invoke, needs_camvid, needs_clip, status, video
from conftest import same_bits
from ttt_adapt.cli import app
from ttt_adapt.config import StreamConfig
from ttt_adapt.data.street import CLASSES, WEIGHTS, street_stream
from ttt_adapt.evaluation.model_info import inspect_model
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    torch.set_num_threads(1)  # as in the tests: the order of sums depends on it
    out = tmp_path_factory.mktemp("trained") / "street.safetensors"
    invoke("train", *TRAIN, f"--out={out}")
    return out


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two labelled clips of the rendered street."""
    root = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("first", "second")):
        for kind in ("images", "labels"):
            (root / name / kind).mkdir(parents=True)
        for i, (frame, labels) in enumerate(street_stream(3, (64, 96), seed)):
            Image.fromarray(frame).save(root / name / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / name / "labels" / f"{i}.png")
    entries = [{"clip": "first"}, {"clip": "second"}]
    (root / "index.json").write_text(json.dumps({"classes": CLASSES, "ignore": 255, "clips": entries}))
    return root


# ---- help


def test_every_command_has_help():
    assert all(name in invoke("--help") for name in ("demo", "train", "calibrate", "run", "eval", "info"))
    options = {
        "demo": ("--out", "--frames", "--seed"),
        "train": (
            "--encoder",
            "--branch",
            "--recipe",
            "--resume",
            "--init",
            "--precision",
            "--accumulate",
            "--no-calibrate",
        ),
        "calibrate": ("--stills", "--clips", "--labels", "--out", "--size", "--drifts", "--no-choose", "--seed"),
        "run": ("--checkpoint", "--out", "--view", "--limit", "--preset", "--arm", "--set"),
        "eval": ("--checkpoint", "--baseline", "--arms", "--seeds", "--clips"),
        "info": ("--encoder", "--branch", "--size"),
    }
    for command, names in options.items():
        text = invoke(command, "--help")
        assert all(name in text for name in names), command


@pytest.mark.slow
def test_the_console_script_and_the_module_are_the_same_command(trained):
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(SCRIPT), "info", str(trained)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "masking" in done.stdout
    for launch in ([str(SCRIPT)], [sys.executable, "-m", "ttt_adapt"]):
        bad = subprocess.run([*launch, "info", "no_such_model"], capture_output=True, text=True, env=environment)
        assert (bad.returncode, bad.stdout) == (1, "")
        assert bad.stderr.startswith("error: timm has no model 'no_such_model'")


# ---- train, info, eval, run


def test_train_writes_a_checkpoint_that_says_how_it_was_made(trained):
    made = load_checkpoint(trained)
    assert made.spec.classes == CLASSES
    assert made.spec.size == (64, 96)
    assert [stage["stage"] for stage in made.spec.training] == ["main", "joint"]
    assert [path.name for path in trained.parent.iterdir()] == [trained.name]


def test_the_same_command_trains_the_same_weights(trained, tmp_path):
    out = tmp_path / "again.safetensors"
    assert f"wrote {out}" in invoke("train", *TRAIN, f"--out={out}")
    first, second = (load_checkpoint(path) for path in (trained, out))
    assert same_bits(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert same_bits(dict(first.branch.state_dict()), dict(second.branch.state_dict()))
    assert first.spec == second.spec


def test_info_shows_what_would_be_adapted_and_what_a_step_costs(trained):
    text = invoke("info", trained)
    for word in ("backbone", "tokens", "stride 16", "64 x 96", "GFLOPs", "x the fixed model"):
        assert word in text
    text = invoke("info", "resnet18", "--branch=decoder=conv", "--branch=mask_ratio=0.75", "--size=64x64")
    for word in ("layer4", "pixels", "ratio 0.75", "conv1", "ConvDecoder", "64 x 64"):
        assert word in text


def test_info_finds_the_encoder_and_shows_where_else_it_may_end(trained):
    found = invoke("info", "resnet18", "--size=64x64")
    assert all(word in found for word in ("layer4", "or, with --encoder", "layer3, layer2"))
    named = invoke("info", "resnet18", "--size=64x64", "--encoder=layer3")
    assert "layer3" in named
    assert "or, with" not in named
    assert "backbone" in invoke("info", trained, "--encoder=auto")


def costs(**changes) -> dict[str, float]:
    """GFLOPs of the prediction, the masked pass and the step, as `info` counts them for a ResNet-18."""
    rows = dict(inspect_model("resnet18", size=(256, 256), config=StreamConfig(**changes)).rows)
    return {name: float(rows[name].split()[0]) for name in ("predict", "masked pass", "step")}


def test_info_counts_every_lever_of_the_cost():
    plain = costs()
    predict, masked, step = plain["predict"], plain["masked pass"], plain["step"]
    assert step == pytest.approx(8 * 3 * masked + predict, rel=0.01)
    assert costs(every=10)["step"] == pytest.approx((step - predict) / 10 + predict, rel=0.01)
    assert costs(gate="surprise")["step"] == pytest.approx(step + 8 * masked, rel=0.01)
    assert costs(norm_stats="ema")["step"] == pytest.approx(step + predict, rel=0.01)
    assert costs(norm_stats="batch") == plain
    assert costs(grad_checkpointing=True)["step"] == pytest.approx(step + 8 * masked, rel=0.01)
    cropped = costs(crop_size=(64, 128))
    assert cropped["masked pass"] == pytest.approx(masked / 8, rel=0.05)
    assert cropped["step"] == pytest.approx(8 * 3 * cropped["masked pass"] + predict, rel=0.01)
    together = costs(crop_size=(64, 128), every=2, gate="surprise", norm_stats="ema", iterations=2, batch_size=4)
    parts = 4 * (3 * 2 + 1) * cropped["masked pass"] + predict
    assert together["step"] == pytest.approx(parts / 2 + predict, rel=0.01)


def test_info_says_what_a_gate_saves_and_refuses_a_crop_larger_than_the_frame(trained, capsys, monkeypatch):
    assert "x while the gate is shut" in invoke("info", trained, "--set=gate=surprise")
    assert "on 32 x 48" in invoke("info", trained, "--set=crop_size=(32, 48)")
    line = fail(capsys, monkeypatch, "info", trained, "--set=crop_size=80")
    assert "crop_size (80, 80) does not fit into a frame of (64, 96)" in line


def test_info_applies_what_a_trained_branch_can_change_and_refuses_the_rest(trained, tmp_path, capsys, monkeypatch):
    assert "ratio 0.5" in invoke("info", trained, "--branch=mask_ratio=0.5", "--encoder=backbone")
    line = fail(capsys, monkeypatch, "info", trained, "--branch=decoder=conv", "--branch=mask_ratio=0.5")
    assert "'decoder' cannot change after attaching" in line
    line = fail(capsys, monkeypatch, "info", trained, "--encoder=nonsense")
    assert "encoder is 'nonsense'" in line
    assert "trained on 'backbone'" in line
    made = load_checkpoint(trained)
    bare = tmp_path / "main.safetensors"
    save_checkpoint(bare, Checkpoint(made.model, None, dataclasses.replace(made.spec, branch=None)))
    assert "ConvDecoder" in invoke("info", bare, "--branch=decoder=conv")  # nothing was trained yet: all may be chosen
    assert "nearest: 'backbone'" in fail(capsys, monkeypatch, "info", bare, "--encoder=backbon")


@pytest.mark.usefixtures("committed")
def test_eval_writes_report_table_and_plots_and_goes_on_where_it_was(trained, clips, tmp_path):
    out = tmp_path / "eval"
    arguments = [
        "eval",
        clips,
        f"--checkpoint={trained}",
        f"--out={out}",
        "--seeds=0,1",
        "--arms=fixed,no-memory,online",
    ]
    arguments += ["--set=batch_size=2", "--set=crop_size=(48, 48)", f"--baseline={trained}"]
    text = invoke(*arguments)
    for word in ("Main Task Only", "Fixed", "TTT-MAE No Memory", "Online TTT-MAE", "first", "mIoU (%)", str(out)):
        assert word in text
    assert {p.name for p in out.iterdir()} == {"report.json", "table.md", "miou.png", "first.png", "second.png"}
    report = json.loads((out / "report.json").read_text())
    assert len(report["runs"]) == 4 * 2 * 2
    assert report["config"]["config"]["batch_size"] == 2
    before = (out / "report.json").read_bytes()
    invoke(*arguments)
    assert (out / "report.json").read_bytes() == before


@pytest.mark.usefixtures("committed")
def test_eval_shows_clips_under_drifts_and_schedules_and_goes_on_where_it_was(trained, clips, tmp_path):
    out = tmp_path / "eval"
    arguments = ["eval", clips, f"--checkpoint={trained}", f"--out={out}", "--arms=fixed", "--clips=first"]
    arguments += ["--drift=none,night:5", "--drift=none@3..noise@2"]
    text = invoke(*arguments)
    names = ["first", "first night:5", "first none@3..noise:3@2"]
    assert all(name in text for name in names)
    report = json.loads((out / "report.json").read_text())
    assert [run["clip"] for run in report["runs"]] == names
    assert [len(run["losses"]) for run in report["runs"]] == [3, 3, 5]
    first, night, noise = (run["per_frame"] for run in report["runs"])
    assert first != night
    assert first == noise[:3]
    assert {p.name for p in out.glob("first*.png")} == {
        "first.png", "first night-5.png", "first none@3..noise-3@2.png",
    }  # fmt: skip
    before = (out / "report.json").read_bytes()
    invoke(*arguments)
    assert (out / "report.json").read_bytes() == before
    arguments[-2] = "--drift=none,night:4"
    assert "other settings (clips)" in str(CliRunner().invoke(app.app, [str(a) for a in arguments]).exception)


def test_drifts_come_over_the_rendered_street_and_in_studies(trained, tmp_path):
    call = [
        "eval",
        "street",
        f"--checkpoint={trained}",
        "--frames=4",
        f"--out={tmp_path / 'out'}",
        "--drift=rain..none",
    ]
    invoke(*call, "--study=smoothness", "--set=batch_size=2")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(run["clip"], len(run["losses"])) for run in report["runs"]} == {("street-0 rain:3..none", 4)}
    assert len(report["runs"]) == 3


@pytest.mark.parametrize(
    ("drift", "told"),
    [("nigth:3", "nearest: 'night'"), ("night:9", "to 5"), ("none..fgo", "nearest: 'fog'"), ("rain,rain:3", "twice")],
)
def test_a_drift_that_does_not_exist_is_told_before_anything_is_loaded(drift, told, capsys, monkeypatch):
    line = fail(capsys, monkeypatch, "eval", "nowhere", "--checkpoint=none.safetensors", f"--drift={drift}")
    assert told in line


@pytest.mark.usefixtures("committed")
def test_a_setting_that_an_arm_does_not_take_is_told(trained, clips, tmp_path, capsys, monkeypatch):
    call = ["eval", clips, f"--checkpoint={trained}", "--clips=first", f"--out={tmp_path / 'out'}"]
    call += ["--arms=fixed,no-memory", "--set=window=4", "--set=crop_size=(48, 48)"]
    assert status(monkeypatch, *call) == 0
    assert "--set window=4 does not change every arm: no-memory has window=1\n" in capsys.readouterr().err


@needs_clip
@pytest.mark.parametrize("name", ["out.mp4", "out [final].mkv"])
def test_run_writes_every_frame_at_the_rate_and_size_of_the_video(trained, tmp_path, name):
    out = tmp_path / name
    text = invoke("run", CLIP, f"--checkpoint={trained}", f"--out={out}", "--limit=6", "--set=batch_size=2")
    assert f"wrote 6 frames to {out}" in text
    assert video(out) == (6, 12.5, (432, 768))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@needs_clip
def test_run_shows_four_panels(trained, tmp_path):
    out = tmp_path / "out.mp4"
    invoke("run", CLIP, f"--checkpoint={trained}", f"--out={out}", "--limit=3", "--view=panels", "--set=batch_size=2")
    count, rate, (height, width) = video(out)
    assert (count, rate) == (3, 12.5)
    assert width >= 2 * 768
    assert height >= 2 * 432


def test_run_takes_a_folder_of_frames_at_their_own_or_another_size(trained, clips, tmp_path):
    for size in ("native", "48x64"):
        out = tmp_path / f"{size}.mp4"
        invoke("run", clips / "first" / "images", f"--checkpoint={trained}", f"--out={out}", f"--size={size}")
        assert video(out) == (3, 25.0, (64, 96))


def test_a_video_that_breaks_keeps_what_was_written_and_says_where(trained, clips, tmp_path, capsys, monkeypatch):
    frames = tmp_path / "frames"
    shutil.copytree(clips / "first" / "images", frames)
    (frames / "2.png").write_bytes((frames / "2.png").read_bytes()[:300])
    out = tmp_path / "out.mp4"
    assert status(monkeypatch, "run", frames, f"--checkpoint={trained}", f"--out={out}") == 1
    assert "2" in capsys.readouterr().err.split("error: ")[1]
    assert video(out) == (2, 25.0, (64, 96))


@pytest.mark.slow
@needs_camvid
@needs_clip
def test_from_real_stills_to_a_real_video(tmp_path):
    """The main job: a CNN trained on CamVid's daylight, evaluated at dusk, run on the video of another camera."""
    model, out = tmp_path / "cnn.safetensors", tmp_path / "eval"
    invoke(
        "train", CAMVID, "--clips=0016E5_train_d", "--size=72x96", "--encoder=resnet18", "--first-epochs=0",
        "--epochs=1", "--encoder-option=channels=(8, 16, 24, 32)", f"--out={model}", "--half",
    )  # fmt: skip
    assert "pixels" in invoke("info", model)
    arms = "--arms=fixed,norm-ema,online"
    invoke("eval", CAMVID, "--clips=0001TP_train_a", "--size=72x96", f"--checkpoint={model}", f"--out={out}", arms)
    assert (out / "0001TP_train_a.png").is_file()
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert all(0 < run["scores"]["miou"] < 1 for run in runs)
    invoke("run", CLIP, f"--checkpoint={model}", f"--out={tmp_path / 'out.mp4'}", "--limit=6")
    assert video(tmp_path / "out.mp4") == (6, 12.5, (432, 768))


# ---- recipes, resuming


def test_probing_trains_the_head_on_the_encoder_that_reconstructs(tmp_path):
    out = tmp_path / "probe.safetensors"
    invoke("train", *TRAIN, "--recipe=probe", "--branch=mask_ratio=0.6", f"--out={out}")
    made = load_checkpoint(out)
    assert [stage["stage"] for stage in made.spec.training] == ["mae", "probe"]
    assert made.branch.mask_ratio == 0.6


def test_a_model_for_the_main_task_alone_can_be_the_start_of_joint_training(tmp_path, capsys, monkeypatch):
    main, joint = tmp_path / "main.safetensors", tmp_path / "joint.safetensors"
    invoke("train", *TRAIN, "--recipe=main", f"--out={main}")
    assert load_checkpoint(main).branch is None
    line = fail(capsys, monkeypatch, "run", "x.mp4", f"--checkpoint={main}", f"--out={tmp_path / 'o.mp4'}")
    assert "main task alone" in line
    assert "train it with the recipe 'joint'" in line
    invoke("train", *TRAIN, "--first-epochs=0", f"--init={main}", f"--out={joint}", "--lr=1e-7")
    first, second = (load_checkpoint(path) for path in (main, joint))
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["folder", "below a file", "not writable"])
def test_a_checkpoint_that_cannot_be_written_is_refused_before_training(kind, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_bytes(b"")
    out = {"folder": "folder.safetensors", "below a file": "file/m.safetensors", "not writable": "/proc/m.safetensors"}
    monkeypatch.setattr(recipe, "fit", lambda *_, **__: pytest.fail("it was trained"))
    line = fail(capsys, monkeypatch, "train", *TRAIN, f"--out={tmp_path / out[kind]}")
    assert ("a folder; expected" if kind == "folder" else "is no folder that can be written to") in line
    assert {path.name for path in tmp_path.iterdir()} == {"folder.safetensors", "file"}


def test_ctrl_c_loses_no_finished_epoch_and_resume_ends_where_an_unbroken_run_ends(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    arguments = ["train", *TRAIN, "--epochs=3"]
    invoke(*arguments, f"--out={whole}")
    real = recipe.fit

    def breaks_off(*args, **keywords):
        def stop(progress):
            if args[4].stage == "joint" and progress.epoch == 2:
                raise KeyboardInterrupt

        return real(*args, **{**keywords, "on_step": stop})

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "fit", breaks_off)
        assert status(monkeypatch, *arguments, f"--out={broken}") == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert not broken.exists()
    assert {path.name for path in tmp_path.glob("broken*")} == {"broken.0-main.state", "broken.1-joint.state"}
    line = fail(capsys, monkeypatch, *arguments, f"--out={broken}", "--resume", "--lr=0.5")
    assert "go on with the same settings" in line
    assert "3/3" in invoke(*arguments, f"--out={broken}", "--resume")
    assert same_bits(*(dict(load_checkpoint(path).model.state_dict()) for path in (whole, broken)))
    assert same_bits(*(dict(load_checkpoint(path).branch.state_dict()) for path in (whole, broken)))
    assert [path.name for path in tmp_path.glob("broken*")] == ["broken.safetensors"]


def test_ctrl_c_between_the_last_epoch_and_the_checkpoint_loses_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.safetensors"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_checkpoint", stop)
        assert status(monkeypatch, "train", *TRAIN, f"--out={out}") == 130
    told = capsys.readouterr().err
    assert f"kept in {tmp_path / 'm.1-joint.state'}: the same command with --resume goes on" in told
    invoke("train", *TRAIN, f"--out={out}", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_info_looks_at_the_model_on_the_device_that_it_is_given(trained, monkeypatch):
    asked = []
    real = model_info.load_checkpoint
    monkeypatch.setattr(model_info, "load_checkpoint", lambda file, device: asked.append(device) or real(file, "cpu"))
    inspect_model(str(trained), device="cuda:1")
    assert asked == ["cuda:1"]


def test_ctrl_c_while_the_command_loads_is_one_word(tmp_path):
    code = "import signal, sys\nfrom ttt_adapt.cli.app import main\nassert 'torch' not in sys.modules\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever the tests were started with
    code += "sys.meta_path.insert(0, type('Stop', (), {'find_spec': staticmethod(lambda name, *_: "
    code += "signal.raise_signal(signal.SIGINT) if name == 'torch' else None)}))\nmain()"
    call = [sys.executable, "-c", code, "run", "film.mp4", f"--out={tmp_path / 'o.mp4'}"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.slow
@needs_clip
def test_ctrl_c_while_running_leaves_a_playable_video(trained, tmp_path):
    out = tmp_path / "out.mp4"
    process = subprocess.Popen(
        [sys.executable, "-m", "ttt_adapt", "run", str(CLIP), f"--checkpoint={trained}", f"--out={out}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(400):
        if any(tmp_path.iterdir()) or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"kept in {out}: " in errors
    count, rate, size = video(out)
    assert 1 <= count < 375
    assert (rate, size) == (12.5, (432, 768))


@pytest.mark.slow
def test_two_processes_train_through_torchrun(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ttt_adapt"]
    done = subprocess.run(
        [*launch, "train", *TRAIN, "--stills=8", f"--out={tmp_path / 'two.safetensors'}"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = load_checkpoint(tmp_path / "two.safetensors")
    assert made.branch is not None
    made.calibration.check(made.model)
    assert done.stderr.count("calibrated on 8 of 8 training stills") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two.safetensors"]


# ---- bad input


BAD_TRAINING = [
    (["street", "--encoder=resnet_18"], "nearest: 'resnet18'"),
    (["street", *TINY, "--encoder-option=foo=1"], "'foo'"),
    (["street", "--encoder-option=depth"], "NAME=VALUE"),
    (["street", "--branch=mask_ration=0.5"], "nearest: 'mask_ratio'"),
    (["street", *TINY, "--branch=mask_ratio=1.5"], "mask_ratio is 1.5"),
    (["street", *TINY, "--branch=decoder=best"], "'best'"),
    (["street", "--encoder=resnet18", "--branch=masking=tokens"], 'use masking="pixels"'),
    (["street", "--size=10"], "HEIGHTxWIDTH"),
    (["street", "--size=10x10"], "at least (48, 64)"),
    (["street", "--encoder=mixer_s32_224", "--size=64x96"], "cannot take images of (64, 96)"),
    (["street", "--recipe=both"], "expected one of joint, main, probe, branch"),
    (["street", "--precision=fp8"], "'fp8'"),
    (["street", "--lr=0"], "--lr is 0.0; expected a number above 0"),
    (["street", "--device=gpu9"], "expected auto, cpu or cuda"),
    (["street", *TINY, "--init=none.safetensors"], "no checkpoint none.safetensors"),
    (["street", "--pretrained=imagenet"], 'expected "timm" (it downloads), a file with weights'),
    (["street", "--pretrained", "--size=64x96"], "--pretrained comes without a source; expected"),
    (["street", "--pretrained"], "package:NAME with NAME one of efficientnet-lite0"),
    (["street", "--pretrained=package:efficientnet-lite0"], "for the encoder tf_efficientnet_lite0"),
    (["no_such_folder"], "does not exist"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD_TRAINING, ids=lambda value: str(value)[-30:])
def test_bad_input_to_train_is_one_line_and_nothing_is_written(arguments, match, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "model.safetensors"
    line = fail(capsys, monkeypatch, "train", "--stills=2", f"--out={out}", *arguments)
    assert match in line
    assert not list(tmp_path.iterdir())


def test_training_starts_from_a_file_of_pretrained_weights(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    out = tmp_path / "m.safetensors"
    invoke("train", *TRAIN, f"--pretrained={tmp_path / 'weights.pth'}", "--lr=1e-12", f"--out={out}")
    made = load_checkpoint(out)
    expected = model.state_dict()["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(made.model.state_dict()["backbone.model.blocks.0.attn.qkv.weight"], expected)
    assert made.spec.mean == timm.get_pretrained_cfg("vit_tiny_patch16_224").mean


def test_training_writes_safetensors_only(tmp_path, capsys, monkeypatch):
    assert ".safetensors" in fail(capsys, monkeypatch, "train", *TRAIN, f"--out={tmp_path / 'model.pt'}")


def test_starting_from_another_model_is_refused(trained, tmp_path, capsys, monkeypatch):
    line = fail(
        capsys, monkeypatch, "train", "street", "--stills=2", "--size=64x96", "--encoder=convnext_atto",
        f"--init={trained}", f"--out={tmp_path / 'a.safetensors'}",
    )  # fmt: skip
    assert "do not belong" in line
    assert "backbone" in line
    assert not list(tmp_path.iterdir())


BAD_RUN = [
    (["none.mp4"], "none.mp4"),
    (["{frames}", "--checkpoint=none.safetensors"], "no checkpoint none.safetensors"),
    (["{frames}", "--checkpoint={noise}"], "no checkpoint written by ttt_adapt"),
    (["{noise}"], "noise.safetensors"),
    (["{empty}"], "empty.mp4"),
    (["{frames}", "--view=split"], '"overlay" or "panels"'),
    (["{frames}", "--size=big"], "HEIGHTxWIDTH"),
    (["{frames}", "--preset=offline"], "expected one of online, paper"),
    (["{frames}", "--set=windows=3"], "'windows'"),
    (["{frames}", "--set=window=0"], "window is 0"),
    (["{frames}", "--set=lr=fast"], "lr is 'fast'"),
    (["{frames}", "--out={folder}/new.avi"], ".avi"),
    (["{frames}", "--out={noise}/new.mp4"], "noise.safetensors is no folder that can be written to"),
    (["{frames}", "--fps=0", "--out={folder}/new/o.mp4"], "fps is 0"),
    (["{frames}", "--out={folder}/new/o.avi"], ".avi"),
    (["{frames}", "--size=8x8", "--out={folder}/new/o.mp4"], "cannot be masked"),
    (["{frames}", "--set=crop_size=(500, 500)"], "does not fit into a frame of (64, 96)"),
    (["{frames}", "--size=8x8"], "cannot be masked"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD_RUN, ids=lambda value: str(value)[-30:])
def test_bad_input_to_run_is_one_line_and_nothing_is_written(
    arguments, match, trained, clips, tmp_path, capsys, monkeypatch
):
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty.mp4").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    names = {
        "frames": clips / "first" / "images",
        "noise": tmp_path / "noise.safetensors",
        "empty": tmp_path / "empty.mp4",
        "folder": tmp_path,
    }
    given = [argument.format(**names) for argument in arguments]
    line = fail(capsys, monkeypatch, "run", f"--checkpoint={trained}", f"--out={tmp_path / 'out.mp4'}", *given)
    assert match in line
    assert sorted(tmp_path.iterdir()) == before


BAD_EVAL = [
    (["{nowhere}"], "does not exist"),
    (["{clips}", "--clips=third"], "no clip 'third'"),
    (["{clips}", "--arms=fixed,onlin"], "nearest: 'online'"),
    (["{clips}", "--arms=,"], "at least one arm"),
    (["{clips}", "--seeds=a"], "seed 'a'"),
    (["{clips}", "--seeds=²"], "seed '²' is no whole number"),
    (["{clips}", "--seeds=1,-1"], "seed '-1' is no whole number"),
    (["{clips}", "--seeds=,"], "seeds is empty"),
    (["{clips}", "--seeds=0,1,00"], "seeds names 0 more than once"),
    (["{clips}", "--checkpoint={trained}", "--seeds=0,0"], "seeds names 0 more than once"),
    (["{clips}", "--size=²x64"], "HEIGHTxWIDTH"),
    (["{clips}", "--arms=norm-ema"], "no BatchNorm"),
    (["{clips}", "--checkpoint=none.safetensors", "--seeds=0,1"], "none.safetensors"),
    (["{clips}", "--checkpoint=none.safetensors"], "2 checkpoints for 1 seeds"),
    (["{clips}", "--baseline=none.safetensors"], "none.safetensors"),
    (["{clips}", "--set=every=0"], "every is 0"),
    (["{clips}", "--out={trained}/eval"], "is no folder that can be written to"),
    (["{other}"], "was trained on the classes"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD_EVAL, ids=lambda value: str(value)[-30:])
def test_bad_input_to_eval_is_one_line_and_nothing_is_written(
    arguments, match, trained, clips, tmp_path, tmp_path_factory, capsys, monkeypatch
):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(clips / "first", other / "first")
    (other / "index.json").write_text(json.dumps({"classes": [*CLASSES[:-1], "cat"], "clips": [{"clip": "first"}]}))
    names = {"clips": clips, "nowhere": tmp_path / "nowhere", "other": other, "trained": trained}
    given = [argument.format(**names) for argument in arguments]
    line = fail(capsys, monkeypatch, "eval", f"--checkpoint={trained}", f"--out={tmp_path / 'eval'}", *given)
    assert match in line
    assert not list(tmp_path.iterdir())


def test_bad_input_to_info_is_one_line(trained, capsys, monkeypatch):
    assert "nearest: 'resnet18'" in fail(capsys, monkeypatch, "info", "resnet_18")
    assert "nearest: 'layer4'" in fail(capsys, monkeypatch, "info", "resnet18", "--encoder=layer9")
    assert "none.safetensors" in fail(capsys, monkeypatch, "info", "none.safetensors")


def test_brackets_in_messages_are_printed_as_they_are(capsys, monkeypatch):
    """Rich would read "[video]" as markup and leave it out of the command to copy."""
    from ttt_adapt.errors import missing

    def broken(*_args, **_keywords):
        raise missing("av", "video")

    monkeypatch.setattr("ttt_adapt.evaluation.model_info.inspect_model", broken)
    assert 'pip install "ttt-adapt[video]"' in fail(capsys, monkeypatch, "info", "resnet18")


def test_a_camera_below_0_is_told_that_cameras_are_numbers_from_0(capsys, monkeypatch):
    assert status(monkeypatch, "run", "-1") == 2
    assert "Cameras are numbers from 0" in capsys.readouterr().err


def test_usage_errors_have_status_2_and_name_the_option(capsys, monkeypatch):
    for arguments, name in ((["train", "street", "--epochs=0"], "--epochs"), (["eval", "clips"], "--checkpoint")):
        assert status(monkeypatch, *arguments) == 2
        assert name in capsys.readouterr().err


# ---- demo


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"the demo's weights are not there: {WEIGHTS.name}")
@pytest.mark.parametrize(("arm", "options"), [("calibrated", ()), ("online", ("--arm=online", "--set=batch_size=2"))])
def test_the_demo_shows_table_video_and_plot(arm, options, tmp_path):
    text = invoke("demo", f"--out={tmp_path / 'demo'}", "--frames=4", *options)
    for word in ("fixed", arm, "mIoU", f"{arm} is ", "demo.mp4", "demo.png", "stream.png"):
        assert word in text
    files = {"demo.mp4", "demo.png", "stream.png", "report.json", "table.md"}
    assert {p.name for p in (tmp_path / "demo").iterdir()} == files
    count, rate, size = video(tmp_path / "demo" / "demo.mp4")
    assert (count, rate) == (4, 10.0)
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert (picture.height + picture.height % 2, picture.width) == size  # a video has even sides
    runs = json.loads((tmp_path / "demo" / "report.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["fixed", arm]
    assert all(np.isfinite(run["scores"]["miou"]) for run in runs)


def test_a_configuration_of_an_arm_that_reads_none_is_refused(tmp_path, capsys, monkeypatch):
    line = fail(capsys, monkeypatch, "demo", f"--out={tmp_path / 'demo'}", "--frames=4", "--set=batch_size=2")
    assert "arm calibrated adapts no weights" in line
    assert not list(tmp_path.iterdir())


def test_a_demo_without_weights_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ttt_adapt.evaluation.demo.WEIGHTS", tmp_path / "none.safetensors")
    assert "none.safetensors" in fail(capsys, monkeypatch, "demo", f"--out={tmp_path / 'demo'}")
    assert not list(tmp_path.iterdir())


# ---- what is reconstructed, and other objectives


def test_a_model_trained_with_rotation_is_saved_loaded_and_adapted_by_it(tmp_path, clips):
    out = tmp_path / "rotation.safetensors"
    invoke("train", *TRAIN, f"--out={out}", "--objective=rotation")
    assert type(load_checkpoint(out).branch).__name__ == "Rotation"
    table = invoke("eval", clips, f"--checkpoint={out}", "--arms=fixed,rotation", f"--out={tmp_path / 'out'}")
    assert "TTT-Rotation" in table
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    losses = [loss for run in runs if run["arm"] == "TTT-Rotation" for loss in run["losses"]]
    assert len(losses) == 6
    assert all(0.3 < loss < 4.0 for loss in losses)  # about ln 4: four turns


def test_what_the_branch_hides_and_scores_can_be_set_at_test_time(tmp_path, trained, clips, capsys, monkeypatch):
    losses = []
    for settings in ([], ["--branch=loss_on=all", "--branch=mask_ratio=0.5"]):
        out = tmp_path / str(len(settings))
        invoke("eval", clips, f"--checkpoint={trained}", "--arms=online", "--clips=first", f"--out={out}", *settings)
        report = json.loads((out / "report.json").read_text())
        losses.append(report["runs"][0]["losses"])
    assert report["config"]["rows"]["Online TTT-MAE"]["branch"] == {"loss_on": "all", "mask_ratio": 0.5}
    assert losses[0] != losses[1]
    wrong = ["eval", clips, f"--checkpoint={trained}", "--arms=online", f"--out={tmp_path / 'no'}"]
    assert "patch_size" in fail(capsys, monkeypatch, *wrong, "--branch=patch_size=8")
    assert "loss_on is 'some'" in fail(capsys, monkeypatch, *wrong, "--branch=loss_on=some")
    assert not (tmp_path / "no").exists()


def test_options_that_would_do_nothing_are_refused(tmp_path, trained, clips, capsys, monkeypatch):
    call = ["eval", clips, f"--checkpoint={trained}", "--arms=fixed", f"--out={tmp_path / 'no'}"]
    for option, told in (
        ("--seed=3", "rendered street"),
        ("--frames=3", "rendered street"),
        ("--set=seed=1", "--seeds"),
    ):
        assert told in fail(capsys, monkeypatch, *call, option)


# ---- data without an index


@pytest.fixture(scope="module")
def nameless(clips, tmp_path_factory) -> Path:
    """The clips without their index."""
    root = tmp_path_factory.mktemp("nameless") / "data"
    shutil.copytree(clips, root)
    (root / "index.json").unlink()
    return root


def test_class_names_are_given_or_written_beside_the_clips(tmp_path, nameless, capsys, monkeypatch):
    quick = [*TRAIN[1:], "--recipe=main"]
    out = tmp_path / "m.safetensors"
    told = fail(capsys, monkeypatch, "train", nameless, *quick, f"--out={out}")
    assert "--classes" in told
    assert "index.json" in told
    invoke("train", nameless, *quick, f"--out={out}", f"--classes={','.join(CLASSES)}")
    assert load_checkpoint(out).spec.classes == CLASSES
    written = tmp_path / "written"
    shutil.copytree(nameless, written)
    (written / "index.json").write_text(json.dumps({"classes": CLASSES}))
    invoke("train", written, *quick, f"--out={tmp_path / 'n.safetensors'}")
    # the checkpoint knows the names
    invoke("eval", nameless, f"--checkpoint={out}", "--arms=fixed", f"--out={tmp_path / 'out'}")
    assert "resume is set" in fail(capsys, monkeypatch, "train", written, *quick, f"--out={out}", "--resume")


def test_settings_that_do_not_fit_name_the_arm_and_the_nearest_field(tmp_path, trained, clips, capsys, monkeypatch):
    call = ["eval", clips, f"--checkpoint={trained}", "--arms=fixed,tent", f"--out={tmp_path / 'no'}"]
    assert "Tent on street.safetensors: lr is 'x'" in fail(capsys, monkeypatch, *call, "--set=tent.lr=x")
    assert "nearest: 'window'" in fail(capsys, monkeypatch, *call, "--set=windw=3")


def test_run_never_writes_over_the_film_that_it_reads(trained, tmp_path, capsys, monkeypatch):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"the only copy")
    (tmp_path / "link.mp4").symlink_to(film)
    for out in (film, tmp_path / "link.mp4"):
        line = fail(capsys, monkeypatch, "run", str(film), f"--checkpoint={trained}", f"--out={out}")
        assert "which is an input and would be lost" in line
        assert film.read_bytes() == b"the only copy"
