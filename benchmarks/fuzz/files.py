"""Damaged files: checkpoints, calibrations, states of trainings, and reports of evaluations."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fuzz.mutations import damaged, damaged_bytes, damaged_json, damaged_tensor
from fuzz.other_files import empty, put_something_else
from fuzz.states import same, tiny
from ttt_adapt import Calibration, MAEBranch, StreamAdapter, StreamConfig, TrainConfig, fit
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.evaluation.model_info import inspect_model
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.model.parameters import dense
from ttt_adapt.tasks.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    load_initial,
    read_calibration,
    save_checkpoint,
    write_calibration,
)
from ttt_adapt.tasks.spec import ModelSpec

CNN = {"encoder": "resnet18", "encoder_options": {"channels": (4, 4, 8, 8)}, "width": 8}
VIT = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "width": 8}


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON at the beginning of a .safetensors file, and the bytes behind it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: str, rest: bytes) -> bytes:
    """A .safetensors file."""
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + rest


OTHERS = 0.15
"""How often something else lies in the place of a file."""


class Folder:
    """A folder for damaged files that is gone with this object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)

    def written(self, data: bytes, suffix: str = ".safetensors") -> Path:
        """A file with this content."""
        file = self.path / f"damaged{suffix}"
        empty(file)
        file.write_bytes(data)
        return file

    def other(self, good: bytes, dice: random.Random, suffix: str = ".safetensors") -> Path:
        """The path of something else than this good file."""
        file = self.path / f"damaged{suffix}"
        put_something_else(file, good, dice)
        return file

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check that the block leaves no file more in the folder and no file less, and all as large as before."""
        before = self.seen()
        yield
        assert self.seen() == before, "the folder has changed"

    def seen(self) -> dict[str, tuple[int, int]]:
        """Size and time of everything in the folder."""
        found = {path.name: path.lstat() for path in self.path.iterdir()}
        return {name: (each.st_size, each.st_mtime_ns) for name, each in found.items()}


class Checkpoints:
    """Damages checkpoints and loads them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._folder = Folder()
        self.good = []
        for kind in (CNN, VIT):
            spec = ModelSpec(**{"classes": ("road", "car"), "size": (32, 48), "branch": {"patch_size": 16}, **kind})
            model, branch = build_model(spec)
            assert isinstance(branch, MAEBranch)
            branch.calibrate(list(torch.randn(8, 3, 32, 48)))
            file = self._folder.path / "good.safetensors"
            save_checkpoint(file, Checkpoint(model.eval(), branch, spec))
            self.good.append(file.read_bytes())
        self._others = [load_checkpoint(self._folder.written(data)) for data in self.good]

    def trial(self, dice: random.Random) -> str:
        """One damaged file: "refused", or "loaded" with a model that predicts."""
        index = dice.randrange(len(self.good))
        good = self.good[index]
        if dice.random() < OTHERS:
            file = self._folder.other(good, dice)
        else:
            file = self._folder.written(self._damaged(good, dice))
        route = dice.random()
        if route < 0.1:
            return self._started(file, self._others[index])
        if route < 0.15:
            return self._rewritten(file, self._others[index])
        if route < 0.17:
            return self._shown(file)
        try:
            with self._folder.unchanged():
                loaded = load_checkpoint(file)
        except TTTAdaptError:
            return "refused"
        try:
            loaded.model(torch.randn(1, 3, 32, 48))
            if isinstance(loaded.branch, MAEBranch):
                config = StreamConfig(window=2, batch_size=1)
                with StreamAdapter(loaded.model, loaded.branch, config=config) as adapter:
                    adapter.step(torch.randn(3, 32, 48))
                with StreamAdapter(loaded.model, loaded.branch) as adapter:
                    adapter.step(torch.randn(3, 32, 48))
        except TTTAdaptError:
            return "loaded, then a step was refused"
        return "loaded"

    def _started(self, file: Path, other: Checkpoint) -> str:
        """Starting a training from a damaged file changes the model whole, or not at all."""
        assert other.branch is not None
        before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (other.model, other.branch)]
        try:
            load_initial(file, other)
        except TTTAdaptError:
            after = [dict(module.state_dict()) for module in (other.model, other.branch)]
            assert same(before, after), "the refusal changed something"
            return "refused as a start"
        other.model.load_state_dict(before[0])
        other.branch.load_state_dict(before[1])
        return "loaded as a start"

    def _rewritten(self, file: Path, other: Checkpoint) -> str:
        """Another calibration is written into a damaged file, or it stays as it is."""
        assert other.calibration is not None
        before = file.read_bytes() if file.is_file() and file.stat().st_size < 10**6 and not file.is_symlink() else None
        try:
            write_calibration(file, other.calibration)
        except TTTAdaptError:
            assert before is None or file.read_bytes() == before, "the refusal changed the file"
            return "refused to be written"
        finally:
            assert not [*self._folder.path.glob(".*")], "a temporary file is left"
        assert read_calibration(file) is not None
        return "written"

    def _shown(self, file: Path) -> str:
        """A damaged file is shown, or refused."""
        try:
            inspect_model(str(file))
        except TTTAdaptError:
            return "refused to be shown"
        return "shown"

    def _damaged(self, data: bytes, dice: random.Random) -> bytes:
        header, rest = header_of(data)
        kind, told = dice.randrange(10), dict(header["__metadata__"])
        if kind < 4:
            name = dice.choice(("spec", "spec", "calibration"))
            return with_header(
                json.dumps({**header, "__metadata__": {**told, name: damaged_json(told[name], dice)}}), rest
            )
        if kind == 4:
            return damaged_bytes(data, dice, len(data) - len(rest))
        if kind == 5:
            return with_header(damaged_json(json.dumps(header), dice), rest)
        if kind == 6:
            told = {k: v for k, v in told.items() if k != dice.choice([*told])}
            told |= {
                dice.choice([*told, "format", "more"]): dice.choice(("", "0", "2", "nan", "1e3", "[]", "null", "x"))
            }
            return with_header(json.dumps({**header, "__metadata__": told}), rest)
        return with_tensors(header, rest, dice)


def with_tensors(header: dict[str, Any], rest: bytes, dice: random.Random) -> bytes:
    """The file with some tensors changed, left out, renamed or added."""
    from safetensors.torch import load

    tensors = load(with_header(json.dumps(header), rest))
    for _ in range(dice.choice((1, 1, 2, 4))):
        name = dice.choice([*tensors])
        value, kind = tensors.pop(name), dice.randrange(8)
        changed = damaged_tensor(value, dice) if kind < 5 else value
        if kind == 5:
            continue
        written = isinstance(changed, Tensor) and dense(changed) and changed.numel() < 10**6  # others take no file
        kept = changed if written else value.reshape(-1)[:0]
        tensors[name if kind < 6 else dice.choice((name + "x", "branch.x", "y", "model." + name))] = kept.contiguous()
    return bytes(save({name: value.clone() for name, value in tensors.items()}, header["__metadata__"]))


class Calibrations:
    """Damages files of calibrations, loads them and corrects a frame by them."""

    def __init__(self) -> None:
        self._folder, self._model = Folder(), tiny()
        branch = MAEBranch.attach(self._model, "0")
        self._good = branch.calibrate(list(torch.randn(8, 3, 32, 48))).to_bytes()
        branch.detach()

    def trial(self, dice: random.Random) -> str:
        """One damaged file: "refused", or "loaded"."""
        header, rest = header_of(self._good)
        told, kind = header["__metadata__"]["calibration"], dice.randrange(4)
        if dice.random() < OTHERS:
            file = self._folder.other(self._good, dice)
        elif kind < 2:
            more = {**header, "__metadata__": {"calibration": damaged_json(told, dice)}}
            file = self._folder.written(with_header(json.dumps(more), rest))
        else:
            data = damaged_bytes(self._good, dice, 400) if kind == 2 else with_tensors(header, rest, dice)
            file = self._folder.written(data)
        try:
            with self._folder.unchanged():
                calibration = Calibration.load(file)
        except TTTAdaptError:
            return "refused"
        try:
            with StreamAdapter(self._model, calibration=calibration) as adapter:
                adapter.step(torch.randn(3, 32, 48))
        except TTTAdaptError:
            return "loaded, then refused"
        return "loaded"


class Training:
    """Damages the states of trainings and goes on from them."""

    def __init__(self) -> None:
        self._folder = Folder()
        self._data = [(image, torch.zeros((), dtype=torch.int64)) for image in torch.randn(4, 3, 32, 48)]
        file = self._folder.path / "run.state"
        self._begin(0)
        self._fit(file, stop=1)
        self._bytes, self._good = file.read_bytes(), torch.load(file, weights_only=True)
        self._begin(1)
        self._fit(file)  # it raises where a whole state is refused
        self._begin(1)

    def _begin(self, seed: int) -> None:
        """A model and a branch that no training has changed."""
        self._model = tiny(seed)
        self._branch = MAEBranch.attach(self._model, "0")
        self._before = {name: value.clone() for name, value in self._now().items()}

    def _now(self) -> dict[str, Any]:
        parts = {"model": self._model, "branch": self._branch}
        return {f"{part}.{name}": v for part in parts for name, v in parts[part].state_dict().items()}

    def _fit(self, file: Path, stop: int = 0) -> None:
        model, branch = self._model, self._branch
        config = TrainConfig(epochs=2, batch_size=2)

        def on_step(progress: Any) -> None:
            if stop and progress.epoch == stop:
                raise KeyboardInterrupt

        try:
            fit(model, branch, self._data, _mean, config, state_file=file, origin="x", on_step=on_step)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            assert stop

    def trial(self, dice: random.Random) -> str:
        """One damaged file: "refused" with the model as it was, or "loaded"."""
        kind = dice.random()
        if kind < OTHERS:
            file = self._folder.other(self._bytes, dice, ".state")
        elif kind < 0.3:
            file = self._folder.written(damaged_bytes(self._bytes, dice, 2000), ".state")
        else:
            file = self._folder.written(b"", ".state")
            bad = damaged(self._good, dice)
            try:
                torch.save(bad, file)
            except Exception:  # not everything can be written
                return "not written"
        seen = self._folder.seen()
        try:
            self._fit(file)
        except TTTAdaptError:
            assert same(self._before, self._now()), "the refusal changed something"
            assert self._folder.seen() == seen, "the refusal changed the folder"
            return "refused"
        self._begin(1)
        return "loaded"


def _mean(output: Tensor, _targets: Any) -> Tensor:
    return output.mean()


class Reports:
    """Damages reports of evaluations and reads them."""

    def __init__(self) -> None:
        self._folder = Folder()
        run = Run("fixed", "dusk", 0, [0.5, None], [None, 0.1], 3.0, scores={"miou": 0.5}, per_class={"road": 0.4})
        failures = [{"arm": None, "clip": "noon", "seed": None, "error": "DataError: no labels"}]
        report = Report({"rows": {"fixed": {}}, "seeds": [0]}, {"torch": "2"}, [run], failures)
        report.save(self._folder.path / "good.json")
        self._good = (self._folder.path / "good.json").read_text()

    def trial(self, dice: random.Random) -> str:
        """One damaged file: "refused", or "loaded" with tables that can be written."""
        from ttt_adapt.evaluation.tables import markdown_table

        text = damaged_json(self._good, dice) if dice.random() < 0.8 else ""
        data = text.encode("utf-8", "surrogatepass") if text else damaged_bytes(self._good.encode(), dice, 1000)
        if dice.random() < OTHERS:
            file = self._folder.other(self._good.encode(), dice, ".json")
        else:
            file = self._folder.written(data, ".json")
        try:
            with self._folder.unchanged():
                report = Report.load(file)
            if report.runs:
                markdown_table(report)
        except TTTAdaptError:
            return "refused"
        return "loaded"
