"""What `ttt-adapt run` writes: films with a legend, label maps, label videos, raw outputs."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import ttt_adapt.evaluation.adapt_video as module
from arm_inputs import CLASSES, SIZE, checkpoint, write_clip
from colours import write_video
from command_line import fail, invoke, video
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.adapt_video import adapt_video
from ttt_adapt.tasks.checkpoint import load_checkpoint, save_checkpoint
from ttt_adapt.video import VideoWriter

PALETTE = ((10, 20, 30), (200, 0, 0), (0, 0, 250))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_checkpoint(file, checkpoint(palette=PALETTE))
    return file


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """A folder of five pictures whose names are no numbers from 0."""
    root = tmp_path_factory.mktemp("clips") / "clip"
    write_clip(root, 5)
    for index, name in enumerate(("a", "b 1", "b 2", "b 10", "ü")):
        (root / "images" / f"{index}.png").rename(root / "images" / f"{name}.png")
    return root / "images"


def run(frames: Path, model: Path, *more: object) -> str:
    return invoke("run", frames, f"--checkpoint={model}", "--arm=fixed", *more)


def test_label_maps_are_palette_pictures_of_the_frames_names_and_sizes_and_raw_outputs_give_them(
    model, frames, tmp_path
):
    labels, raw = tmp_path / "labels", tmp_path / "raw"
    text = run(frames, model, f"--labels-out={labels}", f"--raw-out={raw}", "--size=32x48")
    assert f"wrote 5 frames to {labels}, as label maps\nwrote 5 frames to {raw}, as raw outputs\n" in text
    assert "raw outputs take " in text
    assert {path.name for path in tmp_path.iterdir()} == {"labels", "raw"}  # no film, since nobody asked for one
    names = {"a", "b 1", "b 2", "b 10", "ü"}
    assert {path.name for path in labels.iterdir()} == {*(f"{name}.png" for name in names), "run.json"}
    assert {path.name for path in raw.iterdir()} == {*(f"{name}.npz" for name in names), "run.json"}
    made = load_checkpoint(model)
    normalize = made.spec.preprocess()
    for name in names:
        with Image.open(labels / f"{name}.png") as image:
            assert (image.mode, image.size) == ("P", SIZE[::-1])
            assert image.getpalette()[:9] == [level for colour in PALETTE for level in colour]
            ids = np.asarray(image)
        output = np.load(raw / f"{name}.npz")["output"]
        assert (output.dtype, output.shape) == (np.float32, (3, 32, 48))
        frame = np.asarray(Image.open(frames / f"{name}.png").convert("RGB"))
        assert np.array_equal(ids, made.task.predict(torch.from_numpy(output)[None], frame))
        with torch.no_grad():
            expected = made.model(type(normalize)(normalize.mean, normalize.std, (32, 48))(frame))[0]
        torch.testing.assert_close(torch.from_numpy(output), expected)
    about = json.loads((labels / "run.json").read_text())
    assert about["classes"] == list(CLASSES)
    assert about["palette"] == [list(colour) for colour in PALETTE]
    assert (about["frames"], about["complete"]) == (5, True)


def test_frames_of_a_video_have_numbers_and_a_film_is_written_where_it_is_asked_for(model, tmp_path):
    with VideoWriter(tmp_path / "in.mp4", 25) as writer:
        for level in (0, 80, 160):
            writer.write(np.full((*SIZE, 3), level, np.uint8))
    text = run(tmp_path / "in.mp4", model, f"--labels-out={tmp_path / 'l'}", f"--out={tmp_path / 'o.mp4'}", "--limit=2")
    assert f"wrote 2 frames to {tmp_path / 'o.mp4'}\n" in text
    assert {path.name for path in (tmp_path / "l").iterdir()} == {"000000.png", "000001.png", "run.json"}
    assert video(tmp_path / "o.mp4") == (2, 25.0, SIZE)


@pytest.mark.parametrize("name", ["cam:1.mp4", "[red]a.mp4", "a:car:b.mp4", "file:a.mp4", "pipe:0.mp4", "[b] c:d.mkv"])
def test_a_film_has_the_name_that_it_was_given_and_it_is_told_as_it_is(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    made = write_video(tmp_path / f"a{Path(name).suffix}", [np.zeros((*SIZE, 3), np.uint8)] * 2, sound=True)
    made.rename(f"in/{name}")
    told = run(Path("in") / name, model, f"--out={name}")
    assert {path.name for path in tmp_path.iterdir()} == {"in", name}
    assert f"wrote 2 frames to {name}\n" in told
    assert f"{name}: the sound (1 track) is left out" in told
    command = shlex.split(told.partition("put it back with: ")[2].splitlines()[0].partition(" (it may")[0])
    inputs = [command[place + 1] for place, part in enumerate(command) if part == "-i"]
    for written, named in zip((name, f"in/{name}"), inputs, strict=True):
        assert Path(written).samefile(named)
        with av.open(named) as container:  # FFmpeg takes it for a file
            assert container.streams.video
    assert "wrote 2 frames to out.mp4\n" in run(Path(name), model)


def test_pictures_of_one_name_and_two_suffixes_have_a_label_map_each(model, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.bmp", "a.tif"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "in" / name)
    run(tmp_path / "in", model, f"--labels-out={tmp_path / 'l'}")
    assert {path.name for path in (tmp_path / "l").iterdir()} == {"a.bmp.png", "a.tif.png", "run.json"}


def test_the_palette_of_the_checkpoint_colours_the_film(model, frames, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(VideoWriter, "write", lambda _self, picture: shown.append(picture))
    monkeypatch.setattr(VideoWriter, "close", lambda _self: None)
    run(frames, model, f"--out={tmp_path / 'o.mp4'}", f"--labels-out={tmp_path / 'l'}", "--limit=1")
    frame, ids = (np.asarray(Image.open(folder / "a.png")) for folder in (frames, tmp_path / "l"))
    expected = 0.5 * frame + 0.5 * np.array(PALETTE)[ids]
    assert np.abs(shown[0] - expected).max() <= 1


def test_a_legend_names_the_classes_below_the_film(frames, tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", checkpoint(classes=("aa", "b", "c"), palette=PALETTE))
    run(frames, tmp_path / "m.safetensors", f"--out={tmp_path / 'o.mp4'}", "--legend")
    count, _, (height, width) = video(tmp_path / "o.mp4")
    assert (count, width) == (5, SIZE[1])
    assert SIZE[0] < height <= 2 * SIZE[0]
    assert height % 2 == 0


# ---- a video of labels


def test_a_video_of_labels_holds_the_label_maps_exactly_with_names_and_colours(model, frames, tmp_path):
    film = tmp_path / "labels.mkv"
    told = run(frames, model, f"--labels-out={film}", "--fps=12.5")
    assert f"wrote 5 frames to {film}, as label maps\n" in told
    assert os.listdir(tmp_path) == ["labels.mkv"]  # and no film, since nobody asked for one
    run(frames, model, f"--labels-out={tmp_path / 'folder'}")
    expected = [
        np.asarray(Image.open(tmp_path / "folder" / f"{name}.png")) for name in ("a", "b 1", "b 2", "b 10", "ü")
    ]
    with av.open(str(film)) as container:
        about, stream = container.metadata, container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("ffv1", 12.5)
        found = [frame.to_ndarray() for frame in container.decode(stream)]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(np.unique(expected)) > 1
    assert json.loads(about["CLASSES"]) == list(CLASSES)
    assert json.loads(about["PALETTE"]) == [list(colour) for colour in PALETTE]
    assert (about["MADE_BY"], about["SOURCE"]) == ("ttt-adapt run", str(frames))


def test_a_video_of_labels_is_written_over_only_when_asked_and_stays_when_a_run_fails(
    model, frames, tmp_path, capsys, monkeypatch
):
    film = tmp_path / "labels.MKV"
    film.write_bytes(b"precious")
    call = ["run", frames, f"--checkpoint={model}", "--arm=fixed", f"--labels-out={film}"]
    assert f"--labels-out is {film}, which exists: choose another name, or set --overwrite" in fail(
        capsys, monkeypatch, *call
    )
    for same in ("--out", "--raw-out"):
        line = fail(capsys, monkeypatch, *call, f"{same}={film}", "--overwrite")
        assert "choose a name for each" in line or "the name of a file; expected a folder" in line
    assert film.read_bytes() == b"precious"
    invoke(*call, "--overwrite")
    with av.open(str(film)) as container:
        assert len(list(container.decode(video=0))) == 5
    line = fail(capsys, monkeypatch, "run", film, *call[2:], "--overwrite")
    assert f"--labels-out is {film}, which is an input and would be lost" in line


@pytest.mark.parametrize(
    ("option", "name"),
    [("labels-out", "l.mp4"), ("labels-out", "l.png"), ("raw-out", "raw.mkv"), ("raw-out", "raw.npz")],
)
def test_a_name_of_a_file_is_no_name_for_a_folder(option, name, model, frames, tmp_path, capsys, monkeypatch):
    call = ["run", frames, f"--checkpoint={model}", f"--{option}={tmp_path / name}"]
    line = fail(capsys, monkeypatch, *call)
    assert f"--{option} is {tmp_path / name}, the name of a file; expected a folder" in line
    assert ("a file ending in .mkv for a video of labels" in line) == (option == "labels-out")
    assert not os.listdir(tmp_path)


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["--labels-out={folder}"],
            "--labels-out is {folder}, which is not empty: choose another folder, or set --",
        ),
        (
            ["--labels-out={folder}", "--overwrite"],
            "which holds what no run has written, and nothing of that is",
        ),
        (["--raw-out={folder}/film.mp4"], "--raw-out is {folder}/film.mp4, a file; expected a folder"),
        (["--labels-out={new}", "--raw-out={new}"], "and so is --raw-out: choose a name for each"),
        (["--out={folder}/film.mp4"], "--out is {folder}/film.mp4, which exists: choose another name, or set --overwr"),
        (["--labels-out={new}", "--out={folder}/film.mp4"], "film.mp4, which exists"),
        (["--labels-out={new}", "--view=panels"], "--legend, --view and --fps are of a film, and none is written:"),
    ],
)
def test_nothing_is_written_over_unasked_and_nothing_else_is_written_then(
    more, match, model, frames, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "film.mp4").write_bytes(b"precious")
    names = {"folder": folder, "new": tmp_path / "new"}
    monkeypatch.setattr(module, "load_checkpoint", lambda *_: pytest.fail("work was done"))
    call = ["run", frames, f"--checkpoint={model}", *(each.format(**names) for each in more)]
    assert match.format(**names) in fail(capsys, monkeypatch, *call)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("film.mp4", b"precious")]


def test_a_task_without_classes_has_raw_outputs_and_no_label_maps_or_legend(frames, tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path / "c.safetensors", checkpoint(classes=(), task="colorization"))
    call = ["run", frames, f"--checkpoint={tmp_path / 'c.safetensors'}", "--arm=fixed", f"--out={tmp_path / 'o.mp4'}"]
    line = fail(capsys, monkeypatch, *call, f"--labels-out={tmp_path / 'l'}")
    assert "colorization has no classes: leave it out; --out has the pictures, and --raw-out what the model" in line
    assert "leave --legend out" in fail(capsys, monkeypatch, *call, "--legend")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    invoke(*call[:-1], f"--raw-out={tmp_path / 'r'}")
    assert np.load(tmp_path / "r" / "a.npz")["output"].shape == (2, *SIZE)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["contents"].startswith("raw outputs: a and b")


def test_overwrite_replaces_all_of_an_earlier_run_and_nothing_else(model, frames, tmp_path):
    labels, film = tmp_path / "labels", tmp_path / "o.mp4"
    run(frames, model, f"--labels-out={labels}", f"--out={film}")
    (labels / "notes.txt").write_text("mine")
    (labels / "my picture.png").write_bytes(b"mine, too")
    run(frames, model, f"--labels-out={labels}", f"--out={film}", "--limit=2", "--overwrite")
    assert {path.name for path in labels.iterdir()} == {
        "a.png", "b 1.png", "run.json", "notes.txt", "my picture.png",
    }  # fmt: skip
    assert video(film)[0] == 2


def test_the_same_rules_hold_in_python(model, frames, tmp_path):
    out = tmp_path / "o.mp4"
    out.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="which exists: choose another name, or set `overwrite`"):
        adapt_video(str(frames), model, out, arm="fixed")
    with pytest.raises(ConfigError, match="nothing is to be written"):
        adapt_video(str(frames), model, None, arm="fixed")
    assert out.read_bytes() == b"precious"
    assert adapt_video(str(frames), model, out, arm="fixed", overwrite=True) == 5
    assert video(out)[0] == 5
