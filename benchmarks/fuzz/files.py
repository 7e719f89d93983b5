"""Damaged files: checkpoints, calibrations, states of trainings, and reports of evaluations."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fuzz.mutations import damaged, damaged_bytes, damaged_json, damaged_tensor
from fuzz.states import same, tiny
from ttt_adapt import Calibration, MAEBranch, StreamAdapter, StreamConfig, TrainConfig, fit
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.model.parameters import dense
from ttt_adapt.tasks.checkpoint import Checkpoint, build_model, load_checkpoint, load_initial, save_checkpoint
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


class Folder:
    """A folder for damaged files that is gone with this object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)

    def written(self, data: bytes, suffix: str = ".safetensors") -> Path:
        """A file with this content."""
        file = self.path / f"damaged{suffix}"
        file.write_bytes(data)
        return file


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
        file = self._folder.written(self._damaged(self.good[index], dice))
        if dice.random() < 0.1:
            return self._started(file, self._others[index])
        try:
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
        kept = changed if isinstance(changed, Tensor) and dense(changed) else value.reshape(-1)[:0]
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
        if kind < 2:
            data = with_header(json.dumps({**header, "__metadata__": {"calibration": damaged_json(told, dice)}}), rest)
        else:
            data = damaged_bytes(self._good, dice, 400) if kind == 2 else with_tensors(header, rest, dice)
        try:
            calibration = Calibration.load(self._folder.written(data))
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
        self._fit(tiny(), file, stop=1)
        self._bytes, self._good = file.read_bytes(), torch.load(file, weights_only=True)

    def _fit(self, model: Any, file: Path, stop: int = 0) -> None:
        branch = MAEBranch.attach(model, "0")
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
        file = self._folder.path / "damaged.state"
        if dice.random() < 0.2:
            file.write_bytes(damaged_bytes(self._bytes, dice, 2000))
        else:
            bad = damaged(self._good, dice)
            try:
                torch.save(bad, file)
            except Exception:  # not everything can be written
                return "not written"
        model = tiny(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            self._fit(model, file)
        except TTTAdaptError:
            assert same(before, dict(model.state_dict())), "the refusal changed something"
            return "refused"
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
        try:
            report = Report.load(self._folder.written(data, ".json"))
            if report.runs:
                markdown_table(report)
        except TTTAdaptError:
            return "refused"
        return "loaded"
