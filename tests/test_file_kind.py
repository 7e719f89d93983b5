"""A file of another kind is named in the error, with what takes it; what would wait or fill the memory is not read."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import settle_norms
from ttt_adapt import Calibration, MAEBranch, StreamAdapter, StreamConfig, TrainConfig, fit
from ttt_adapt.errors import CheckpointError, ConfigError, DataError, TTTAdaptError
from ttt_adapt.evaluation.model_info import inspect_model
from ttt_adapt.evaluation.report import Report
from ttt_adapt.file_kind import HEADER, RUN_STATE, kind_of
from ttt_adapt.files import read_small
from ttt_adapt.sharing.state_file import write_state
from ttt_adapt.tasks.calibrate import calibration_target
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, read_calibration, read_spec, save_checkpoint
from ttt_adapt.tasks.dense_model import DenseModel
from ttt_adapt.tasks.pretrained import read_weights
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.training.state import read_state

safetensors = pytest.importorskip("safetensors.torch")
NAMES = (
    "checkpoint", "calibration", "stream", "training", "weights", "openmmlab", "pickle", "torch", "report", "coco",
    "json", "text", "config", "picture", "pictures", "video", "arrays", "zip", "pdf", "onnx", "empty", "folder",
    "device", "unknown", "safetensors", "nothing", "stream-file", "run-state",
)  # fmt: skip


def read_training(file):
    return read_state(file, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Name of a kind -> a file of it."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = settle_norms(zoo.resnet())
    saved = {
        "openmmlab": {"state_dict": model.state_dict(), "meta": {}},
        "weights": model.state_dict(),
        "torch": {"anything": 1},
        "pickle": nn.Identity(),
    }
    found = {name: folder / f"{name}.pt" for name in (*saved, "stream")}
    for name, value in saved.items():
        torch.save(value, found[name])
    branch = MAEBranch.attach(model, patch_size=16)
    data = [(image, torch.zeros(())) for image in torch.randn(2, 3, 64, 64)]
    config = TrainConfig(epochs=1, batch_size=2)
    fit(model, branch, data, lambda output, _: output.mean(), config, state_file=folder / "training.state")
    branch.calibrate(list(torch.randn(8, 3, 64, 64))).save(folder / "calibration.safetensors")
    with StreamAdapter(model, branch, config=StreamConfig(window=2, batch_size=1)) as adapter:
        torch.save(adapter.state_dict(), found["stream"])
        adapter.save(folder / "stream.safetensors")
    write_state(folder / "run.safetensors", {}, RUN_STATE)
    found |= {"stream-file": folder / "stream.safetensors", "run-state": folder / "run.safetensors"}
    found |= {"calibration": folder / "calibration.safetensors", "training": folder / "training.state"}
    spec = ModelSpec("resnet18", ("a", "b"), (32, 32), {"channels": (4, 4, 8, 8)}, None, width=8)
    made = DenseModel("resnet18", 2, width=8, encoder_options=spec.encoder_options).eval()
    save_checkpoint(folder / "checkpoint.safetensors", Checkpoint(made, None, spec))
    Report({"rows": {}}, {}, []).save(folder / "report.json")
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    contents = {
        "coco.json": json.dumps({"images": [], "annotations": []}).encode(), "json.json": b'{"classes": ["road"]}',
        "text.txt": b"some words\n", "config.py": b"_base_ = ['x.py']\n",
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(40), "video.mp4": b"\x00\x00\x00\x20ftypisom" + bytes(40),
        "zip.zip": b"", "pdf.pdf": b"%PDF-1.7\n", "onnx.onnx": b"\x08",
        "empty.safetensors": b"", "unknown.safetensors": bytes(range(200)),
        "safetensors.safetensors": (20).to_bytes(8, "little") + b'{"__metadata__": oops' + bytes(9),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        found[name.partition(".")[0]] = folder / name
    with zipfile.ZipFile(found["zip"], "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("folder", "pictures"):
        found[name] = folder / name
        found[name].mkdir()
    (found["pictures"] / "a.jpg").write_bytes(b"\xff\xd8\xff")
    found["device"] = folder / "device"
    os.mkfifo(found["device"])
    found |= {"nothing": folder / "nothing", "checkpoint": folder / "checkpoint.safetensors"}
    return found | {"report": folder / "report.json", "arrays": folder / "arrays.npz"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_known_by_its_content(files, name):
    assert kind_of(files[name]).name == name


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("checkpoint", "nothing", "safetensors")])
def test_what_is_no_checkpoint_is_named_wherever_a_checkpoint_is_expected(files, name):
    kind, file = kind_of(files[name]), files[name]
    for call in (
        load_checkpoint, read_spec, read_calibration, lambda path: inspect_model(str(path)),
        lambda path: calibration_target(path, None, False),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="is no checkpoint written by ttt_adapt: it is") as refused:
            call(file)
        assert kind.what in str(refused.value)
        assert "FILE" not in str(refused.value)


def test_the_error_says_what_takes_the_file(files):
    table = {
        "calibration": f"StreamAdapter(model, calibration=Calibration.load('{files['calibration']}'))",
        "stream": f"`load_state_dict(torch.load('{files['stream']}'))` of a StreamAdapter",
        "stream-file": f"`load('{files['stream-file']}')` of a StreamAdapter",
        "run-state": f"`ttt-adapt run` with --state {files['run-state']} --resume",
        "training": "`ttt-adapt train --resume`",
        "weights": f"`ttt-adapt train --pretrained {files['weights']}`",
        "openmmlab": f"`ttt-adapt mm test CONFIG {files['openmmlab']}`",
        "pickle": "save the model's state_dict() in its place",
        "video": f"`ttt-adapt run {files['video']} --checkpoint MODEL.safetensors`",
        "pictures": f"`ttt-adapt run {files['pictures']} --checkpoint MODEL.safetensors`",
        "report": "`Report.load`",
    }
    for name, use in table.items():
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(files[name])
        assert use in str(refused.value), name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nothing"])
def test_every_reader_takes_its_own_kind_and_names_the_others(files, name):
    readers = {
        "calibration": (Calibration.load, CheckpointError, ("safetensors",)),
        "report": (Report.load, DataError, ("json", "text")),
        "training": (read_training, CheckpointError, ("torch", "unknown")),
    }
    for own, (read, error, alike) in readers.items():
        if name == own:
            read(files[name])
            continue
        with pytest.raises(error) as refused:
            read(files[name])
        assert name in alike or kind_of(files[name]).what in str(refused.value)


def test_weights_to_start_from_are_not_looked_for_in_other_files(files):
    for name in ("stream", "calibration"):
        with pytest.raises(CheckpointError, match=f"is no file of weights: it is {kind_of(files[name]).what}; "):
            read_weights(files[name])


def test_a_name_that_is_neither_a_file_nor_a_model_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match="there is no file .*none.pt, and timm has no model"):
        inspect_model(str(tmp_path / "none.pt"))


def test_a_file_beside_the_work_hides_no_model_of_timm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert dict(inspect_model("resnet18", size=(32, 32)).rows)["model"].startswith("ResNet")


def test_what_has_no_end_or_more_than_a_memory_is_not_read(tmp_path):
    huge, pipe = tmp_path / "huge.safetensors", tmp_path / "pipe.safetensors"
    huge.write_bytes(b'{"format": 2}')
    os.truncate(huge, 2**40)
    os.mkfifo(pipe)
    endless = tmp_path / "endless.safetensors"
    endless.symlink_to("/dev/zero")
    for file in (huge, pipe, endless):
        for read in (
            Calibration.load,
            Report.load,
            load_checkpoint,
            lambda file: read_state(file, torch.device("cpu")),
        ):
            with pytest.raises(TTTAdaptError):
                read(file)
    with pytest.raises(DataError, match=f"it has {2**40} bytes; expected at most"):
        read_small(huge, DataError)
    with pytest.raises(DataError, match="it is no regular file"):
        read_small(pipe, DataError)
    with pytest.raises(DataError, match="it is not there"):
        read_small(tmp_path / "none", DataError)


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_not_unpacked(tmp_path):
    file = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(HEADER + 1))
    assert file.stat().st_size < HEADER / 100
    assert kind_of(file).name == "unknown"


def test_a_stream_that_is_given_another_kind_of_state_names_it(files):
    model = settle_norms(zoo.resnet())
    with StreamAdapter(model, MAEBranch.attach(model, patch_size=16)) as adapter:
        for name in ("training", "weights", "openmmlab"):
            with pytest.raises(CheckpointError, match=f"the state is {kind_of(files[name]).what}; expected what"):
                adapter.load_state_dict(torch.load(files[name], weights_only=True))
