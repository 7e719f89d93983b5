"""`ttt-adapt calibrate`, and what `info`, `run` and `eval` make of a calibrated checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arm_inputs import checkpoint, write_clip
from command_line import fail, invoke, status, video
from conftest import same_bits
from ttt_adapt.config import StreamConfig
from ttt_adapt.evaluation.adapt_video import adapt_video
from ttt_adapt.evaluation.model_info import inspect_model
from ttt_adapt.model.rule import Rule
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, read_calibration, save_checkpoint, write_calibration
from ttt_adapt.video import open_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two labelled clips of the classes of `made`: "ground" of 18 frames, "short" of 3."""
    root = tmp_path_factory.mktemp("clips")
    write_clip(root / "ground", 18, seed=5)
    write_clip(root / "short", 3, seed=6)
    return root


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, clips) -> Path:
    """A calibrated checkpoint of a CNN with an MAE branch."""
    torch.set_num_threads(1)
    file = tmp_path_factory.mktemp("calibrated") / "model.safetensors"
    save_checkpoint(file, checkpoint())
    invoke("calibrate", file, clips, "--clips=ground", "--drifts=night,noise")
    return file


@pytest.fixture
def made(tmp_path) -> Path:
    """A checkpoint that is not calibrated."""
    save_checkpoint(tmp_path / "made.safetensors", checkpoint())
    return tmp_path / "made.safetensors"


def without_branch(file: Path, out: Path) -> Path:
    """The same checkpoint, as if it were trained for the main task alone."""
    found = load_checkpoint(file)
    spec = dataclasses.replace(found.spec, branch=None)
    save_checkpoint(out, Checkpoint(found.model, None, spec, found.calibration))
    return out


def pictures(file: Path) -> list[np.ndarray]:
    with open_video(file) as film:
        return list(film)


# ---- calibrate


def test_the_command_writes_the_calibration_and_says_what_it_found_and_what_is_next(made, clips):
    before = load_checkpoint(made)
    text = invoke("calibrate", made, clips, "--clips=ground", "--stills=16", "--drifts=night:2,fog")
    after = load_checkpoint(made)
    assert same_bits(dict(before.model.state_dict()), dict(after.model.state_dict()))
    assert after.calibration.stills == 16
    assert list(after.calibration.record["candidates"][0]["scores"]) == ["none", "night:2", "fog:3"]
    assert f"calibrated on 16 of 18 frames of {clips} with their labels, in " in text
    for word in ("Rules that were tried", "under drifts", "nowhere: the model as it is", "BatchNorm inputs", " s\n"):
        assert word in text
    assert f"wrote {made}\nnext: ttt-adapt run VIDEO --checkpoint {made}\n" in text


def test_another_file_leaves_the_model_as_it_is(made, clips, tmp_path):
    before, out = made.read_bytes(), tmp_path / "new" / "other.safetensors"
    text = invoke("calibrate", made, clips / "ground" / "images", f"--out={out}", "--no-choose")
    assert made.read_bytes() == before
    assert "without labels" in text
    assert "Rules that were tried" not in text
    assert "not chosen, so it is the default rule" in " ".join(text.split())
    assert load_checkpoint(out).calibration.stills == 18


def test_steps_choose_how_gradient_steps_are_taken_and_show_what_was_tried(made, clips):
    text = invoke("calibrate", made, clips, "--clips=ground", "--stills=16", "--drifts=night", "--steps")
    for word in ("Settings of gradient steps that were tried", "iterations=0 (no gradient step)", "the fixed model"):
        assert word in text
    found = load_checkpoint(made).calibration
    assert found.settings in [row["settings"] for row in found.record["settings"]]
    shown = " ".join(text.split())
    assert all(f"{name}={value!r}" in shown for name, value in found.settings.items())
    info = " ".join(invoke("info", made).split())
    assert all(f"{name}={value!r}" in info for name, value in found.settings.items())


def test_steps_of_a_checkpoint_without_a_branch_are_refused_and_nothing_is_written(
    made, clips, tmp_path, capsys, monkeypatch
):
    main = without_branch(made, tmp_path / "main.safetensors")
    before = main.read_bytes()
    line = fail(capsys, monkeypatch, "calibrate", main, clips, "--clips=ground", "--steps")
    assert "this checkpoint has no MAE branch" in line
    assert main.read_bytes() == before


def test_run_leaves_a_chosen_gate_out_where_other_statistics_are_asked_for(calibrated, clips, tmp_path):
    found, chosen = load_checkpoint(calibrated), tmp_path / "chosen.safetensors"
    write_calibration(calibrated, found.calibration.replace(settings={"gate": "calibrated", "lr": 1e-3}), chosen)
    call = ["run", clips / "short" / "images", f"--checkpoint={chosen}", f"--out={tmp_path / 'o.mp4'}", "--overwrite"]
    assert "calibrated statistics, with gradient steps" in invoke(*call)
    for more in ("--set=norm_stats=frozen", "--set=window=auto"):
        invoke(*call, more)


@pytest.mark.parametrize(
    "more", [{}, {"norm_stats": "ema"}, {"gate": "surprise"}, {"gate": "calibrated", "norm_stats": "auto"}], ids=str
)
def test_info_of_a_stream_without_gradient_steps_counts_one_prediction(calibrated, more):
    rows = dict(inspect_model(str(calibrated), config=StreamConfig(iterations=0, **more)).rows)
    assert "GFLOPs: no gradient step, and predict" in rows["step"]
    assert rows["cost"] == "1.0 x the fixed model"
    assert "no gradient step" in invoke("info", calibrated, "--set=iterations=0")


def test_info_counts_a_prediction_for_the_calibrated_gate_where_it_opens_and_none_where_it_is_shut(calibrated):
    config = StreamConfig.online()
    rows = [
        dict(inspect_model(str(calibrated), config=config.replace(gate=gate)).rows) for gate in ("none", "calibrated")
    ]
    plain, gated = (float(each["cost"].split(" x")[0]) for each in rows)
    assert gated == pytest.approx(plain + 1.0, abs=0.11)
    assert "1.0 x while the gate is shut" in rows[1]["cost"]
    assert "a prediction for the gate" in rows[1]["step"]


def test_stills_that_look_unlike_the_training_data_are_told(made, clips):
    quiet = checkpoint()
    for name, value in quiet.model.state_dict().items():
        value.add_(100 if name.endswith("running_mean") else 0)
    save_checkpoint(made, quiet)
    text = invoke("calibrate", made, clips, "--clips=ground", "--no-choose")
    assert "the stills are " in text
    assert "look unlike the data that the model was trained on" in text.split("the stills are ")[1]


def test_fewer_than_16_stills_take_the_default_rule_and_it_is_said(made, clips):
    text = " ".join(invoke("calibrate", made, clips, "--clips=ground", "--stills=15").split())
    assert "the default rule: a choice needs at least 16 stills" in text
    assert "Rules that were tried" not in text
    found = load_checkpoint(made).calibration
    assert (found.rule, found.stills, dict(found.record)) == (Rule("batchnorm"), 15, {})
    info = " ".join(invoke("info", made).split())
    assert "the default rule: a choice needs at least 16 stills" in info


BAD = [
    (["{nowhere}"], "does not exist"),
    (["{clips}", "--clips=short"], "got 3 stills; expected at least 8"),
    (["{clips}", "--stills=7"], "got 7 stills; expected at least 8"),
    (["{clips}", "--clips=groud"], "nearest: 'ground'"),
    (["{clips}", "--drifts=night,nosie:3"], "nearest: 'noise'"),
    (["{clips}", "--drifts=night:7"], "to 5"),
    (["{clips}", "--drifts=,"], "drifts is empty"),
    (["{clips}", "--size=big"], "HEIGHTxWIDTH"),
    (["{clips}", "--out={folder}/m.pt"], ".safetensors"),
    (["{clips}", "--device=gpu9"], "expected auto, cpu or cuda"),
    (["{pictures}", "--labels"], "no frames in"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD, ids=lambda value: str(value)[-30:])
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments, match, made, clips, tmp_path, tmp_path_factory, capsys, monkeypatch
):
    loose = tmp_path_factory.mktemp("loose")
    Image.new("RGB", (64, 48)).save(loose / "0.png")
    names = {"clips": clips, "nowhere": tmp_path / "nowhere", "folder": tmp_path, "pictures": loose}
    before = made.read_bytes()
    given = [argument.format(**names) for argument in arguments]
    assert match in fail(capsys, monkeypatch, "calibrate", made, *given)
    assert made.read_bytes() == before
    assert list(tmp_path.iterdir()) == [made]


def test_what_is_no_checkpoint_is_refused(clips, tmp_path, capsys, monkeypatch):
    line = fail(capsys, monkeypatch, "calibrate", tmp_path / "none.safetensors", clips)
    assert "there is no checkpoint" in line


# ---- info


def test_info_shows_the_calibration_and_how_to_make_one(calibrated, made):
    text = invoke("info", calibrated)
    for word in ("18 stills of 48 x 64, of these weights", "BatchNorm inputs", "by their labels, on night:3, noise:3"):
        assert word in text
    assert f"none; ttt-adapt calibrate {made} STILLS makes one" in invoke("info", made)


def test_info_tells_a_calibration_of_other_weights_and_a_stream_refuses_it(calibrated, clips, tmp_path):
    found, other = load_checkpoint(calibrated), tmp_path / "other.safetensors"
    with torch.no_grad():
        found.model.backbone.conv1.weight.mul_(1.5)
    save_checkpoint(other, found)
    assert "OTHER WEIGHTS" in dict(inspect_model(str(other)).rows)["calibration"]
    with pytest.raises(ValueError, match="calibrate the model again"):
        adapt_video(str(clips / "short" / "images"), other, tmp_path / "o.mp4")
    assert list(tmp_path.iterdir()) == [other]


# ---- run


def test_run_says_how_the_calibration_is_used_where_it_is(calibrated, made, clips, tmp_path):
    call = ["run", clips / "short" / "images", f"--out={tmp_path / 'o.mp4'}", "--set=batch_size=2", "--overwrite"]
    assert "calibrated statistics, with gradient steps: " in invoke(*call, f"--checkpoint={calibrated}")
    for more in ([f"--checkpoint={calibrated}", "--set=norm_stats=frozen"], [f"--checkpoint={made}"]):
        assert "calibrated statistics" not in invoke(*call, *more)


def test_a_calibrated_checkpoint_without_a_branch_runs_by_its_statistics_alone(calibrated, clips, tmp_path):
    main = without_branch(calibrated, tmp_path / "main.safetensors")
    frames = clips / "short" / "images"
    text = invoke("run", frames, f"--checkpoint={main}", f"--out={tmp_path / 'a.mp4'}")
    assert "calibrated statistics, without gradient steps: " in text
    invoke("run", frames, f"--checkpoint={calibrated}", "--arm=calibrated", f"--out={tmp_path / 'b.mp4'}")
    same = zip(pictures(tmp_path / "a.mp4"), pictures(tmp_path / "b.mp4"), strict=True)
    assert all(np.array_equal(first, second) for first, second in same)
    invoke("run", frames, f"--checkpoint={main}", f"--out={tmp_path / 'c.mp4'}", "--view=panels")
    assert video(tmp_path / "c.mp4")[0] == 3


@pytest.mark.parametrize("arm", ["fixed", "norm-blend", "online", "no_memory", "tent", "fixed+smooth", "every-2"])
def test_run_shows_any_streaming_arm(arm, calibrated, clips, tmp_path):
    for size in ("native", "32x48"):
        out = tmp_path / f"{size}.mp4"
        call = ["run", clips / "short" / "images", f"--checkpoint={calibrated}", f"--arm={arm}", f"--size={size}"]
        invoke(*call, f"--out={out}")
        assert video(out) == (3, 25.0, (48, 64))


def test_an_arm_of_a_preset_shows_what_the_preset_shows(calibrated, clips, tmp_path):
    frames = clips / "short" / "images"
    for name, how in (("a", ["--preset=no-memory"]), ("b", ["--arm=no-memory"])):
        invoke("run", frames, f"--checkpoint={calibrated}", f"--out={tmp_path / name}.mp4", *how, "--set=lr=1e-2")
    same = zip(pictures(tmp_path / "a.mp4"), pictures(tmp_path / "b.mp4"), strict=True)
    assert all(np.array_equal(first, second) for first, second in same)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--arm=onlin"], "nearest: 'online'"),
        (["--arm=offline"], "sees the whole clip before it predicts"),
        (["--arm=online", "--preset=paper"], "both say what runs"),
        (["--arm=fixed", "--set=lr=1e-3"], "adapts no weights"),
        (["--arm=ln-adapt"], "no LayerNorm"),
        (["--arm=no-memory", "--set=window=4"], "would make another arm"),
        (["--arm=rotation"], "no rotation head"),
    ],
)
def test_arms_that_cannot_run_are_refused_before_anything_is_written(
    more, match, calibrated, clips, tmp_path, capsys, monkeypatch
):
    call = ["run", clips / "short" / "images", f"--checkpoint={calibrated}", f"--out={tmp_path / 'o.mp4'}"]
    assert match in fail(capsys, monkeypatch, *call, *more)
    assert not list(tmp_path.iterdir())


def test_without_branch_and_calibration_run_names_both_ways_and_plain_arms_still_run(
    made, clips, tmp_path, capsys, monkeypatch
):
    main = without_branch(made, tmp_path / "main.safetensors")
    call = ["run", clips / "short" / "images", f"--checkpoint={main}", f"--out={tmp_path / 'o.mp4'}"]
    line = fail(capsys, monkeypatch, *call)
    assert "main task alone" in line
    assert "ttt-adapt calibrate" in line
    assert "not calibrated" in fail(capsys, monkeypatch, *call, "--arm=calibrated")
    assert "'joint'" in fail(capsys, monkeypatch, *call, "--arm=online")
    assert status(monkeypatch, *call, "--arm=fixed") == 0
    assert video(tmp_path / "o.mp4")[0] == 3


def test_run_takes_over_the_settings_that_were_chosen_for_the_model(calibrated, clips, tmp_path, monkeypatch):
    import ttt_adapt.evaluation.adapt_video as module

    seen = []
    monkeypatch.setattr(module, "adapt_video", lambda *_args, **keywords: seen.append(keywords["config"]) or 0)
    found, chosen = load_checkpoint(calibrated), tmp_path / "chosen.safetensors"
    write_calibration(calibrated, found.calibration.replace(settings={"lr": 3e-5, "window": 4}), chosen)
    call = ["run", clips / "short" / "images", f"--checkpoint={chosen}"]
    for more in ([], ["--set=lr=1e-3"], ["--preset=paper"]):
        invoke(*call, *more)
    plain, changed, paper = seen
    assert plain == StreamConfig.online(lr=3e-5, window=4)
    assert changed == StreamConfig.online(lr=1e-3, window=4)
    assert paper == StreamConfig.paper()


# ---- eval


def rows_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())["config"]["rows"]


@pytest.mark.usefixtures("committed")
def test_eval_compares_calibrated_statistics_where_there_is_a_calibration(calibrated, made, clips, tmp_path):
    common = ["eval", clips, "--clips=short", "--set=batch_size=2"]
    text = invoke(*common, f"--checkpoint={calibrated}", f"--out={tmp_path / 'a'}")
    digest = read_calibration(calibrated).digest
    rows = rows_in(tmp_path / "a")
    assert [row["arm"] for row in rows.values()] == [
        "fixed", "calibrated", "no-memory", "implicit", "explicit", "online",
    ]  # fmt: skip
    assert all(row["calibrations"] == [digest] for row in rows.values())
    assert f"Calibration of the models: {digest}." in " ".join(text.split())
    text = invoke(*common, f"--checkpoint={made}", f"--out={tmp_path / 'b'}")
    assert [row["arm"] for row in rows_in(tmp_path / "b").values()] == [
        "fixed", "no-memory", "implicit", "explicit", "online",
    ]  # fmt: skip
    assert "Calibration" not in text
    main = without_branch(calibrated, tmp_path / "main.safetensors")
    invoke(*common[:3], f"--checkpoint={main}", f"--out={tmp_path / 'c'}")
    assert [row["arm"] for row in rows_in(tmp_path / "c").values()] == ["fixed", "calibrated"]


@pytest.mark.usefixtures("committed")
def test_rows_of_a_calibrated_and_of_another_model_are_told_apart(calibrated, made, clips, tmp_path):
    call = ["eval", clips, "--clips=short", "--arms=fixed,calibrated", f"--checkpoint={calibrated}"]
    text = " ".join(invoke(*call, f"--baseline={made}", f"--out={tmp_path / 'a'}").split())
    digest = read_calibration(calibrated).digest
    assert f"Main Task Only none; Fixed {digest}; Calibrated statistics {digest}." in text


@pytest.mark.usefixtures("committed")
def test_results_of_an_earlier_calibration_are_not_gone_on_with(calibrated, clips, tmp_path, capsys, monkeypatch):
    model = Path(shutil.copy(calibrated, tmp_path / "m.safetensors"))
    call = ["eval", clips, "--clips=short", "--arms=fixed,calibrated", f"--checkpoint={model}"]
    call += [f"--out={tmp_path / 'eval'}"]
    invoke(*call)
    before = (tmp_path / "eval" / "report.json").read_bytes()
    invoke("calibrate", model, clips, "--clips=ground", "--stills=9", "--no-choose", "--overwrite")
    assert "other settings (rows)" in fail(capsys, monkeypatch, *call)
    assert (tmp_path / "eval" / "report.json").read_bytes() == before
