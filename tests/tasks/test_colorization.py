"""Colorization, as a user has it: from a folder of pictures to a coloured film and a table, and what bad input says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import readme
from arm_inputs import CONFIG, VIT, checkpoint
from colours import SIZE, colour_frames, decoded, write_album, write_metric_weights, write_video
from command_line import DATA, TINY, fail, invoke, needs_clip
from ttt_adapt.arms import ARMS, find_arm
from ttt_adapt.colour import to_grey
from ttt_adapt.data.drift import Drift, parse_schedule
from ttt_adapt.errors import ConfigError, DataError, FrameError
from ttt_adapt.evaluation.adapt_video import adapt_video
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.rows import clips_from, fingerprints, metric_files, rows_of
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.runners import start
from ttt_adapt.evaluation.tables import markdown_table
from ttt_adapt.tasks import Colorization, find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ttt_adapt.tasks.colorization import cells
from ttt_adapt.tasks.colorization.networks import ALEXNET, INCEPTION
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train as train_recipe

ROOT = Path(__file__).parents[2]
TRAIN = [
    "--task=colorization",
    *TINY,
    "--size=48x64",
    "--batch-size=3",
    "--first-epochs=1",
    "--epochs=1",
    "--no-calibrate",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_album(tmp_path_factory.mktemp("pictures") / "album")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "colours.safetensors"
    invoke("train", pictures, *TRAIN, f"--out={out}")
    return out


@pytest.fixture(scope="module")
def cell_model(pictures, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cells") / "cells.safetensors"
    invoke("train", pictures, *TRAIN, "--task-option=mode=classification", f"--out={out}")
    return out


def streamed(out: Path, **options) -> list[np.ndarray]:
    """The pictures that `run` hands to the writer, before H.264 loses anything."""
    written: list[np.ndarray] = []

    class Writer:
        def __init__(self, path, fps):
            self.path, self.fps, self.count, self.finished = path, fps, 0, False

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def close(self):
            self.finished = True

        def write(self, frame):
            self.count += 1
            written.append(frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttt_adapt.evaluation.run_outputs.VideoWriter", Writer)
        adapt_video(out=out, config=CONFIG, **options)
    return written


def by_hand(made: Checkpoint, outputs: list[torch.Tensor], truth: list[np.ndarray]) -> dict[str, Any]:
    """PSNR of what the task makes of a model's outputs, and of the grey."""
    greys = [to_grey(frame) for frame in truth]
    ours = [made.task.predict(output, grey) for output, grey in zip(outputs, greys, strict=True)]
    errors, grey = (
        [float(np.square(a.astype(float) - b).mean()) for a, b in zip(frames, truth, strict=True)]
        for frames in (ours, greys)
    )
    decibels = [10 * np.log10(255**2 / error) for error in (*errors, np.mean(errors), np.mean(grey))]
    return {"per_frame": decibels[:-2], "psnr": decibels[-2], "psnr_grey": decibels[-1]}


def check_scores(run: Run, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert (run.per_frame if name == "per_frame" else run.scores[name]) == pytest.approx(value, abs=1e-3), name


def stepped(arm: str, made: Checkpoint, truth: list[np.ndarray]) -> list[torch.Tensor]:
    """What an arm returns for the grey of the frames."""
    runner = start(find_arm(arm), made, CONFIG)
    outputs = [runner.step(to_grey(frame)).detach().clone() for frame in truth]
    runner.close()
    return outputs


# Data --------------------------------------------------------------------------------------------------------------


def test_an_arm_is_shown_grey_and_scored_against_the_colours(pictures):
    clip = Colorization.clips(str(pictures), ["trip"], SIZE, None, "auto")[0]
    for (grey, colours), frame in zip(clip, colour_frames(4), strict=True):
        assert np.array_equal(colours, frame)
        assert np.array_equal(grey, to_grey(frame))
    assert clip.describe()["frames"] == 4


@pytest.mark.parametrize("drift", [Drift("white-balance", 5), parse_schedule("none..white-balance:5")])
def test_a_drift_comes_over_the_colours_and_the_model_is_shown_their_grey(pictures, drift):
    (clip,) = clips_from(str(pictures), ["trip"], SIZE, task="colorization", drifts=[drift])
    assert clip.name == f"trip {drift}"
    orange = Drift("white-balance", 5).apply(colour_frames(4)[3], 3)
    np.testing.assert_array_equal(clip[3][1], orange)
    np.testing.assert_array_equal(clip[3][0], to_grey(orange))
    assert clip.describe()["drift"] == str(drift)


# Training ----------------------------------------------------------------------------------------------------------


def test_training_takes_any_folder_and_says_which_pictures_teach_nothing(trained, pictures, capfd, tmp_path):
    spec = load_checkpoint(trained).spec
    assert (spec.task, spec.task_options, spec.classes, spec.size) == ("colorization", {}, (), SIZE)
    train_recipe(str(pictures), tmp_path / "m.safetensors", size=SIZE, recipe="main", first_epochs=0,
                 encoder_options=VIT["encoder_options"], task="colorization",
                 config=TrainConfig(epochs=1, batch_size=8))  # fmt: skip
    assert "2 pictures are stored in grey and left out" in capfd.readouterr().err


def test_a_film_in_black_and_white_teaches_nothing_and_is_left_out_by_name(tmp_path):
    title, frames = np.zeros((*SIZE, 3), np.uint8), colour_frames(4)
    write_video(tmp_path / "old.mkv", [to_grey(frame) for frame in frames])
    with pytest.raises(DataError, match="all 4 pictures and frames of videos are grey"):
        Colorization.stills(str(tmp_path), [], SIZE, None)
    write_video(tmp_path / "new.mkv", [title, title, *frames])  # it begins in black
    stills = Colorization.stills(str(tmp_path), [], SIZE, None)
    assert [clip.name for clip in stills.samples] == ["new"]
    assert len(stills.notes) == 1
    assert "1 videos are black and white and left out" in stills.notes[0]
    assert stills.notes[0].endswith(": old")


def test_what_a_model_is_shown_and_what_it_has_to_find_are_the_grey_and_the_colours_of_one_picture():
    frame = colour_frames(1)[0]
    image = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    grey, ab = Colorization().sample(image, torch.zeros(SIZE))
    assert (grey == grey[:1]).all()
    np.testing.assert_allclose(grey[0].numpy() * 255, to_grey(frame)[..., 0], atol=0.51)
    task = Colorization()
    from ttt_adapt.tasks.colorization.task import AB_SCALE

    back = task.predict(ab[None] / AB_SCALE, to_grey(frame))
    assert np.abs(back.astype(int) - frame).max() <= 6
    assert np.abs(back.astype(int) - frame).mean() < 1


@pytest.mark.parametrize("mode", ["regression", "classification"])
def test_a_few_steps_teach_a_model_the_colours_of_one_picture(mode):
    """The whole loop on one picture: the colours come out, and the loss of the criterion falls."""
    task = Colorization(mode)
    made = checkpoint(task="colorization", classes=(), task_options={"mode": mode}, branch=None)
    frame = np.full((*SIZE, 3), (200, 80, 60), np.uint8)
    frame[:, 32:] = (40, 90, 60)
    image = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
    grey, ab = task.sample(image, torch.zeros(SIZE))
    criterion = task.criterion([(grey, ab)])
    model, optimizer = made.model.train(), torch.optim.Adam(made.model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = criterion(model(grey[None]), ab[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    found = task.predict(model.eval()(grey[None]).detach(), to_grey(frame)).astype(int)
    left, right = found[:, :24].mean((0, 1)), found[:, 40:].mean((0, 1))
    assert left[0] - left[2] > 40
    assert right[1] - right[0] > 15


def test_training_on_several_sizes_asks_for_one(pictures, tmp_path, capsys, monkeypatch):
    line = fail(capsys, monkeypatch, "train", pictures, "--task=colorization", f"--out={tmp_path / 'm.safetensors'}")
    assert "give one size for all, height x width" in line
    assert "48x64" in line
    assert not list(tmp_path.iterdir())


BAD_TRAINING = [
    (["{grey}"], "all 1 pictures are grey"),
    (["{empty}"], "no picture and no video was found"),
    (["{nowhere}"], "does not exist; expected pictures or videos"),
    (["{album}", "--classes=a,b"], "colorization has no classes"),
    (["{album}", "--task-option=mode=guess"], "expected one of regression, classification"),
    (["{album}", "--task-option=modes=1"], "nearest: 'mode'"),
    (["{album}", "--task-option=temperature=0"], "temperature is 0; expected a number above 0 and up to 1"),
    (["{album}", "--task-option=temperature=abc"], "temperature is 'abc'; expected a number above 0"),
    (["{album}", "--task-option=temperature=True"], "temperature is True; expected a number above 0"),
    (["{album}", "--task-option=uniform=None"], "uniform is None; expected a number from 0 to 1"),
    (["{album}", "--task-option=nonsense"], "expected NAME=VALUE, such as mode=classification"),
    (["{album}", "--task=segmentation"], "pictures without labels do for --task colorization"),
    (["{album}", "--task-option=mode=[1]"], "expected one of regression, classification"),
    (["{album}", "--task=colourization"], "nearest: 'colorization'"),
    (["street", "--task=segmentation", "--stills=2", "--task-option=mode=regression"], "segmentation has no options"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD_TRAINING, ids=lambda value: str(value)[-40:])
def test_bad_input_to_train_is_one_line_and_nothing_is_written(
    arguments, match, pictures, tmp_path, capsys, monkeypatch
):
    for name in ("grey", "empty"):
        (tmp_path / name).mkdir()
    Image.new("L", (64, 48), 9).save(tmp_path / "grey" / "a.png")
    names = {"grey": tmp_path / "grey", "empty": tmp_path / "empty", "nowhere": tmp_path / "no", "album": pictures}
    out = tmp_path / "new" / "m.safetensors"
    given = [argument.format(**names) for argument in arguments]
    assert match in fail(capsys, monkeypatch, "train", *TRAIN, *given, f"--out={out}")
    assert not out.parent.exists()


# Run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["trained", "cell_model"])
@pytest.mark.parametrize("size", [(49, 67), (64, 96)])
def test_run_keeps_size_and_luminance_of_a_grey_film_whatever_the_model_sees(model, size, request, tmp_path):
    film = [to_grey(frame) for frame in colour_frames(3, size)]
    source = write_video(tmp_path / "old.mkv", film, 10, pix_fmt="gray")
    coloured = streamed(tmp_path / "out.mp4", source=str(source), checkpoint=request.getfixturevalue(model))
    assert len(coloured) == 3
    for picture, grey in zip(coloured, film, strict=True):
        assert picture.shape == grey.shape
        assert np.abs(to_grey(picture).astype(int) - grey).max() <= 1


@pytest.mark.parametrize("fps", [10, 16, 30])
def test_run_writes_a_film_of_any_rate_and_of_odd_size(fps, trained, tmp_path):
    film = [to_grey(frame) for frame in colour_frames(4, (49, 67))]
    source = write_video(tmp_path / "old.mkv", film, fps, pix_fmt="gray")
    out = tmp_path / "colour.mp4"
    told = invoke("run", source, "--task=colorization", f"--checkpoint={trained}", f"--out={out}", "--set=batch_size=2")
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == fps
    written = decoded(out)
    assert [frame.shape for frame in written] == [(50, 68, 3)] * 4  # H.264 wants even sides
    assert np.abs(to_grey(written[0])[:49, :67].astype(int) - film[0]).mean() < 4
    assert told.count("49 x 67 is written as 50 x 68") == 1
    assert "in colour" not in told


def test_a_film_in_colour_is_converted_and_that_is_said_once(trained, tmp_path, capfd):
    frames = colour_frames(3)
    source = write_video(tmp_path / "new.mkv", frames)
    coloured = streamed(tmp_path / "out.mp4", source=str(source), checkpoint=trained)
    told = capfd.readouterr().err
    assert told.count("new.mkv is in colour: its frames are converted to grey") == 1
    grey = write_video(tmp_path / "grey.mkv", [to_grey(frame) for frame in frames])
    again = streamed(tmp_path / "out.mp4", source=str(grey), checkpoint=trained)
    assert all(np.array_equal(a, b) for a, b in zip(coloured, again, strict=True))
    assert capfd.readouterr().err == ""


def test_sound_that_is_left_out_and_an_uneven_rate_are_said(trained, tmp_path, capfd, monkeypatch):
    film = [to_grey(frame) for frame in colour_frames(4)]
    source = write_video(tmp_path / "old.mkv", film, pix_fmt="gray", times=[0, 40, 200, 230], sound=True)
    assert len(streamed(tmp_path / "out.mp4", source=str(source), checkpoint=trained)) == 4
    told = capfd.readouterr().err
    files = f"ffmpeg -i {tmp_path}/out.mp4 -i {source} -map 0:v -map 1:a -c copy -shortest {tmp_path}/out-sound.mkv"
    assert f"old.mkv: the sound (1 track) is left out; put it back with: {files} (it may drift" in told
    assert "not evenly spaced" in told
    streamed(tmp_path / "out.mp4", source=str(source), checkpoint=trained, fps=5)
    assert "at 5 frames a second it would not fit" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    even = write_video(tmp_path / "-talking.mkv", film, 10, pix_fmt="gray", sound=True)
    streamed(Path("-o.mp4"), source=even.name, checkpoint=trained, fps=10)
    assert "ffmpeg -i ./-o.mp4 -i ./-talking.mkv " in capfd.readouterr().err
    even = write_video(tmp_path / "even.mkv", film, 30, pix_fmt="gray")  # 33 and 34 ms, as Matroska rounds
    streamed(tmp_path / "out.mp4", source=str(even), checkpoint=trained)
    assert "evenly" not in capfd.readouterr().err


@pytest.mark.parametrize(("option", "rate"), [((), 25), (("--fps=12.5",), 12.5)])
def test_a_folder_of_pictures_is_a_film_of_25_or_any_other_number_of_frames_a_second(option, rate, trained, tmp_path):
    for index, frame in enumerate(colour_frames(2)):
        Image.fromarray(to_grey(frame)).save(tmp_path / f"{index}.png")
    out = tmp_path / "new" / "o.mp4"  # whose folder is made
    told = invoke("run", tmp_path, f"--checkpoint={trained}", f"--out={out}", "--set=batch_size=2", *option)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == rate
    assert ("has no frame rate: written at 25 frames a second" in told) == (not option)


def test_run_says_where_in_a_clip_folder_the_pictures_are(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "scene").mkdir()
    Image.fromarray(colour_frames(1)[0]).save(tmp_path / "scene" / "0.png")
    line = fail(capsys, monkeypatch, "run", tmp_path, f"--checkpoint={trained}", f"--out={tmp_path / 'o.mp4'}")
    assert f"{tmp_path} holds no images. There are some in {tmp_path / 'scene'}: pass that folder." in line


def test_run_does_not_claim_to_have_kept_what_could_not_be_written(trained, tmp_path, capsys, monkeypatch):
    source = write_video(tmp_path / "old.mkv", [to_grey(frame) for frame in colour_frames(2)], pix_fmt="gray")
    call = ["run", source, f"--checkpoint={trained}", f"--out={tmp_path / 'o.mp4'}", "--set=batch_size=2"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    line = fail(capsys, monkeypatch, *call)
    told = f"error: --out: {tmp_path / 'o.mp4'} cannot be finished: the disk is gone. The frames so far can "
    assert line.startswith(told)
    assert not (tmp_path / "o.mp4").exists()
    assert len(decoded(tmp_path / "o.partial.mp4")) == 2


def test_training_calibrates_by_agreement_and_run_uses_it(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, frame in enumerate(colour_frames(16)):
        Image.fromarray(frame).save(pictures / f"{i:02d}.png")
    out, source = tmp_path / "m.safetensors", write_video(tmp_path / "new.mkv", colour_frames(2))
    invoke("train", pictures, *TRAIN, "--calibrate", f"--out={out}")
    made = load_checkpoint(out)
    assert made.calibration.record["by"] == "agreement"
    made.calibration.check(made.model)
    text = invoke("run", source, f"--checkpoint={out}", f"--out={tmp_path / 'o.mp4'}", "--set=batch_size=2")
    assert "calibrated statistics, with gradient steps" in text


def test_a_checkpoint_of_the_other_mode_cannot_begin_one(trained, cell_model, pictures, tmp_path, capsys, monkeypatch):
    call = ["train", pictures / "trip", *TRAIN, f"--out={tmp_path / 'm.safetensors'}"]
    assert "with mode=classification as task options, which" in fail(capsys, monkeypatch, *call, f"--init={cell_model}")
    line = fail(capsys, monkeypatch, *call, "--task-option=mode=classification", f"--init={trained}")
    assert "with none as task options, which makes another head" in line


def test_a_checkpoint_of_another_task_cannot_begin_one(pictures, tmp_path, capsys, monkeypatch):
    other = tmp_path / "classes.safetensors"
    save_checkpoint(other, checkpoint())
    call = ["train", pictures / "trip", *TRAIN, f"--init={other}", f"--out={tmp_path / 'm.safetensors'}"]
    line = fail(capsys, monkeypatch, *call)
    assert "was trained for segmentation, and its head is of no use to a model for colorization" in line


def test_the_page_colours_frames_in_python_as_it_stands(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours.safetensors").symlink_to(trained)
    (code,) = readme.blocks("python", ROOT / "docs" / "colorization.md")
    space = {"frames": colour_frames(3)}
    exec(code, space)
    assert [(picture.shape, picture.dtype) for picture in space["pictures"]] == [((*SIZE, 3), np.uint8)] * 3
    for picture, frame in zip(space["pictures"], space["frames"], strict=True):
        assert np.abs(to_grey(picture).astype(int) - to_grey(frame)).max() <= 1


def test_panels_show_grey_fixed_adapted_and_reconstruction(trained, tmp_path):
    source = write_video(tmp_path / "old.mkv", [to_grey(frame) for frame in colour_frames(2, (96, 128))])
    sheet = streamed(tmp_path / "o.mp4", source=str(source), checkpoint=trained, view="panels")[-1]
    bar = sheet.shape[0] // 2 - 96
    assert sheet.shape == (2 * (96 + bar), 256, 3)
    grey, fixed = sheet[bar : bar + 96, :128], sheet[bar : bar + 96, 128:]
    assert (grey == grey[..., :1]).all()
    assert np.abs(to_grey(fixed).astype(int) - grey).max() <= 1
    assert not np.array_equal(fixed, grey)


def test_grey_pictures_of_16_bits_and_of_a_palette_are_a_film_too(trained, tmp_path):
    grey = np.asarray(Image.fromarray(colour_frames(1)[0]).convert("L"))
    Image.fromarray((grey.astype(np.uint16) << 8) + 7).save(tmp_path / "0.tif")
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(grey).quantize(256).save(tmp_path / "2.png")
    coloured = streamed(tmp_path / "o.mp4", source=str(tmp_path), checkpoint=trained)
    assert [picture.shape for picture in coloured] == [(*SIZE, 3)] * 3
    for picture in coloured[:2]:
        assert np.abs(to_grey(picture)[..., 0].astype(int) - grey).max() <= 1


def test_run_without_a_checkpoint_takes_what_train_writes_by_default(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "old.mkv", [to_grey(frame) for frame in colour_frames(2)], pix_fmt="gray")
    call = ["run", "old.mkv", "--task=colorization", "--out=colour.mp4", "--set=batch_size=2"]
    assert "model.safetensors" in fail(capsys, monkeypatch, *call)
    (tmp_path / "model.safetensors").symlink_to(trained)
    invoke(*call)
    assert len(decoded(tmp_path / "colour.mp4")) == 2


def test_another_task_than_the_checkpoints_is_refused(trained, tmp_path, capsys, monkeypatch):
    source = write_video(tmp_path / "old.mkv", colour_frames(2))
    call = ["run", source, f"--checkpoint={trained}", f"--out={tmp_path / 'o.mp4'}"]
    line = fail(capsys, monkeypatch, *call, "--task=segmentation")
    assert "was trained for colorization, not for segmentation" in line
    assert "nearest: 'colorization'" in fail(capsys, monkeypatch, *call, "--task=colorizing")
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize("mode", ["regression", "classification"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_said_to_have_instead_of_painting_black(mode, value):
    task = Colorization(mode)
    output = torch.zeros(1, task.channels, *SIZE)
    output[0, 1, 3, 3] = value
    with pytest.raises(FrameError, match="not finite.*diverged.*lower the learning rate"):
        task.predict(output, to_grey(colour_frames(1)[0]))


def test_step_returns_what_the_model_returns():
    made = checkpoint(task="colorization", classes=())
    frame = to_grey(colour_frames(1)[0])
    runner = start(ARMS["fixed"], made, CONFIG)
    expected = made.model(made.spec.preprocess()(frame))
    assert torch.equal(runner.step(frame), expected)
    assert expected.shape == (1, 2, *SIZE)


@pytest.mark.slow
@needs_clip
def test_a_real_clip_is_coloured_at_its_own_size(trained, tmp_path):
    out = tmp_path / "colour.mp4"
    clip = DATA / "clips" / "intel_car-detection.mp4"
    invoke("run", clip, "--task=colorization", f"--checkpoint={trained}", f"--out={out}", "--limit=3")
    assert [frame.shape for frame in decoded(out)] == [(432, 768, 3)] * 3


# Evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("committed")
def test_eval_writes_the_shared_report_table_and_plots(trained, pictures, tmp_path):
    out = tmp_path / "eval"
    arms = "--arms=fixed,no-memory,online,online-shuffled"
    call = ["eval", pictures, f"--checkpoint={trained}", "--clips=trip", arms, "--seeds=0,1", f"--out={out}"]
    text = invoke(*call, "--set=batch_size=2")
    for word in ("PSNR (dB)", "SSIM", "flicker (ab)", "Online TTT-MAE"):
        assert word in " ".join(text.split())  # as a column, or where the table names what did not fit
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "psnr.png", "trip.png"}
    report = Report.load(out / "report.json")
    assert report.task is find_task("colorization")
    assert len(report.runs) == 4 * 2
    made, truth = load_checkpoint(trained), colour_frames(4)
    with torch.no_grad():
        outputs = [made.model.eval()(made.spec.preprocess()(to_grey(frame))) for frame in truth]
    fixed = report.select(find_arm("fixed").title)
    assert len(fixed) == 2
    for run in fixed:
        check_scores(run, by_hand(made, outputs, truth))
    for run in report.runs:
        assert run.scores["psnr_grey"] == pytest.approx(fixed[0].scores["psnr_grey"])
        assert (run.per_class, run.scores.keys() & {"miou", "lpips"}) == ({}, set())
        assert len(run.per_frame) == 4
    header = (out / "table.md").read_text().splitlines()[0]
    assert header.startswith(
        "| arm | trip: PSNR (dB) | trip: frame PSNR (dB) | trip: PSNR of the grey (dB) | trip: SSIM |"
    )
    assert "IoU" not in (out / "table.md").read_text()
    before = (out / "report.json").read_bytes()
    again = invoke(*call, "--set=batch_size=2")
    assert (out / "report.json").read_bytes() == before
    assert f"kept in {out / 'report.json'}: 8 finished runs; only what is missing is run" in again


@pytest.mark.parametrize(
    "arm", ["tent", "self-train", "self-train-plain", "ema-teacher", "online+class", "online+smooth", "fixed+vote"]
)
def test_arms_made_of_distributions_say_that_they_do_not_apply_to_a_regression(arm):
    made = checkpoint(task="colorization", classes=())
    with pytest.raises(ConfigError, match=r"class distributions.*colorization.* predicts a and b: it does not apply"):
        start(find_arm(arm), made, CONFIG)


def test_arms_made_of_distributions_run_on_scores_of_cells_and_one_class_per_pixel_is_not_enough():
    made = checkpoint(task="colorization", classes=(), task_options={"mode": "classification"})
    truth = colour_frames(2)
    clip = [(to_grey(frame), frame) for frame in truth]
    for arm in ("tent", "online+smooth"):
        expected = by_hand(made, stepped(arm, made, truth), truth)
        check_scores(run_arm(find_arm(arm), made, clip, CONFIG, name="clip"), expected)
    with pytest.raises(ConfigError, match="online-shuffled keeps one class per pixel"):
        start(find_arm("online-shuffled"), made, CONFIG)


def test_a_shuffled_stream_gives_a_regressions_colours_back_in_order():
    made = checkpoint(task="colorization", classes=())
    clip = [(to_grey(frame), frame) for frame in colour_frames(3)]
    still = CONFIG.replace(lr=1e-12)
    runs = [run_arm(find_arm(arm), made, clip, still, name="c") for arm in ("fixed", "online-shuffled")]
    assert runs[1].per_frame == pytest.approx(runs[0].per_frame, abs=0.05)


def test_clips_of_another_task_or_options_of_labels_are_refused(trained, pictures, tmp_path, capsys, monkeypatch):
    out = f"--out={tmp_path / 'eval'}"
    call = ["eval", pictures, f"--checkpoint={trained}", out]
    assert "colorization has none" in fail(capsys, monkeypatch, *call, "--format=davis")
    assert "colorization has no classes" in fail(capsys, monkeypatch, *call, "--classes=a,b")
    assert "does not apply" in fail(capsys, monkeypatch, *call, "--clips=trip", "--arms=fixed,tent")
    street = tmp_path / "street.safetensors"
    invoke("train", "street", *TINY, "--stills=2", "--size=48x64", "--batch-size=2", "--first-epochs=0", "--epochs=1",
           "--recipe=main", f"--out={street}")  # fmt: skip
    line = fail(capsys, monkeypatch, *call, "--clips=trip", f"--baseline={street}")
    assert "one table is of one task" in line
    assert not (tmp_path / "eval").exists()


def test_a_clip_without_colours_or_too_small_is_refused_before_the_first_run(
    pictures, trained, tmp_path, capsys, monkeypatch
):
    for name, frame in (("grey", to_grey(colour_frames(1)[0])), ("small", colour_frames(1)[0][:10])):
        (tmp_path / name).mkdir()
        Image.fromarray(frame).save(tmp_path / name / "0.png")
    call = ["eval", tmp_path, f"--checkpoint={trained}", "--size=native", f"--out={tmp_path / 'e'}"]
    line = fail(capsys, monkeypatch, *call, "--clips=grey")
    assert "clip grey is black and white: no colours to score against" in line
    line = fail(capsys, monkeypatch, *call, "--clips=small")
    assert "clip small has frames of 10 x 64; expected both sides at least 11 pixels" in line
    assert not (tmp_path / "e").exists()


def test_the_record_knows_files_of_weights_by_content_and_no_other_file(trained, tmp_path):
    (tmp_path / ALEXNET).write_bytes(b"one")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    rows = rows_of(["fixed"], [trained])
    sha = "7692c3ad3540bb80"  # of "one"
    assert fingerprints(metric_files(rows, tmp_path)) == [f"{ALEXNET} sha256:{sha}"]


def test_colorization_trains_and_is_scored_on_the_rendered_street_too(tmp_path):
    out = tmp_path / "s.safetensors"
    invoke("train", "street", *TRAIN, "--stills=3", f"--out={out}")
    text = invoke("eval", "street", f"--checkpoint={out}", "--frames=3", "--arms=fixed", f"--out={tmp_path / 'e'}")
    assert "PSNR" in text


def test_old_reports_load_and_tables_turn_where_less_is_better():
    root = Path(__file__).parents[2] / "benchmarks" / "results"
    old = Report.load(root / "camvid-vit" / "report.json")
    assert (old.task.name, old.headline.field) == ("segmentation", "miou")
    report = Report()
    for arm, flicker in (("fixed", 3.0), ("online", 2.0)):
        for seed in range(2):
            values = {"psnr": 20.0 + seed, "psnr_frames": 20.0, "flicker": flicker + 0.01 * seed}
            report.add(Run(arm, "dog", seed, [20.0] * 3, [None] * 3, 5.0, task="colorization", scores=values))
    lines = markdown_table(report).splitlines()
    assert "**2.00 ± 0.01 (-1.00)**" in lines[3]
    assert "20.50 ± 0.71 (+0.00)" in lines[3]
    assert "in dB" in markdown_table(report)


# Networks of the metrics -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_metric_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.slow
def test_lpips_fid_and_inception_score_are_measured_with_given_weights(weights, trained, pictures, tmp_path):
    out = tmp_path / "eval"
    invoke("eval", pictures, f"--checkpoint={trained}", "--clips=trip", "--arms=fixed", f"--out={out}",
           f"--metric-weights={weights}")  # fmt: skip
    run = json.loads((out / "report.json").read_text())["runs"][0]["scores"]
    assert run["lpips"] > 0
    assert run["fid"] > 0
    assert run["inception_score"] >= 1
    for word in ("LPIPS", "FID", "Inception Score"):
        assert word in (out / "table.md").read_text()


def test_missing_weights_are_named_with_the_place_to_get_them(trained, pictures, tmp_path, capsys, monkeypatch):
    call = ["eval", pictures, f"--checkpoint={trained}", "--clips=trip", "--arms=fixed", f"--out={tmp_path / 'e'}"]
    for folder, told in ((tmp_path, "holds no weights"), (tmp_path / "no", "is not a folder")):
        line = fail(capsys, monkeypatch, *call, f"--metric-weights={folder}")
        assert told in line
        assert f"{ALEXNET} from https://download.pytorch.org" in line
        assert f"{INCEPTION} from https://github.com" in line
    (tmp_path / ALEXNET).write_bytes(b"nothing")
    assert f"{ALEXNET} cannot be read" in fail(capsys, monkeypatch, *call, f"--metric-weights={tmp_path}")
    assert not (tmp_path / "e").exists()


def test_weights_are_refused_where_no_metric_needs_them():
    with pytest.raises(ConfigError, match="no metric of segmentation"):
        checkpoint().task.score(weights=Path("here"))


# A pixel of everything ---------------------------------------------------------------------------------------------


def test_any_encoder_of_timm_will_do():
    for spec in ({}, VIT):
        made = checkpoint(task="colorization", classes=(), **spec)
        truth = colour_frames(2)
        expected = by_hand(made, stepped("online", made, truth), truth)
        run = run_arm(ARMS["online"], made, [(to_grey(f), f) for f in truth], CONFIG, name="c")
        check_scores(run, expected)
        assert run.losses[-1] is not None


def test_the_head_has_a_channel_per_cell():
    made = checkpoint(task="colorization", classes=(), task_options={"mode": "classification"})
    assert made.task.channels == len(cells.cells())
    assert made.model(torch.zeros(1, 3, *SIZE)).shape == (1, len(cells.cells()), *SIZE)
