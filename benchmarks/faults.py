"""Injects faults into streams: no crash, no NaN in a prediction, each fault accounted for, other streams untouched.

    python benchmarks/faults.py --faults 1000 --out benchmarks/results/faults.json

Cameras pan over pictures of their own, in seeded random turns. Most of them meet faults: bad frames, a covered or
hanging camera, a cut, errors inside of a step, spoilt losses, weights and statistics, and a model that somebody else
changes. Each fault says what has to be seen of it: an error that leaves the stream as it was, or a reason in the
reports. The last cameras meet none; their predictions are compared, bit for bit, with those of a run without faults.

`--over many` gives each camera an adapter and a model of its own; `--over one` opens all streams on one adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.evaluation.environment import environment

SIZE = (32, 48)
CONFIG = StreamConfig(window=4, batch_size=2, lr=1e-3, norm_stats="ema", on_cut="shrink")
NORMALIZE = Normalize((0.5,) * 3, (0.5,) * 3)


class Net(nn.Module):
    """A small segmentation model with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.head = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Camera:
    """An endless uint8 video: a camera that goes to and fro over a picture, with noise.

    Args:
        seed: of pictures and noise.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.cut()

    def cut(self) -> None:
        """Point at another picture."""
        coarse = self._random.integers(0, 256, (SIZE[0] // 8, SIZE[1] // 4, 3)).astype(np.float64)
        self._scene, self._at = np.kron(coarse, np.ones((8, 8, 1))), 0

    def read(self) -> np.ndarray:
        """The next frame, [H, W, 3]."""
        width = self._scene.shape[1] - SIZE[1]
        x = width - abs(self._at % (2 * width) - width)
        self._at += 1
        noisy = self._scene[:, x : x + SIZE[1]] + self._random.normal(0, 3, (*SIZE, 3))
        return noisy.clip(0, 255).astype(np.uint8)


class Injector:
    """The places inside of a stream where faults happen; `armed` names the one that happens next, once."""

    def __init__(self) -> None:
        self.armed = ""

    def due(self, *kinds: str) -> str:
        """The armed fault, if it is one of these; it is no longer armed."""
        found, self.armed = (self.armed, "") if self.armed in kinds else ("", self.armed)
        return found


class Optimizer(torch.optim.SGD):
    """Writes into the weights of the encoder where a fault asks for it."""

    def __init__(self, groups: Any, injector: Injector) -> None:
        super().__init__([{**group, "lr": 1e-3} for group in groups], momentum=0.9)
        self.injector = injector

    def step(self, closure: Any = None) -> None:
        super().step()
        if kind := self.injector.due("NaN weights", "collapsed weights"):
            for group in self.param_groups:
                for p in group["params"] if group["name"].startswith("encoder") else ():
                    p.fill_(math.nan if kind == "NaN weights" else 0.0)


def open_streams(count: int, over: str) -> tuple[list[Any], list[Injector], list[nn.Module]]:
    """Streams, and the injector and the model of each: over one model, or each over one of its own."""
    adapters = [_adapter() for _ in range(count if over == "many" else 1)]
    if over == "many":
        return [each for each, _, _ in adapters], [each for _, each, _ in adapters], [each for _, _, each in adapters]
    adapter, injector, model = adapters[0]
    return [adapter.open_stream(f"camera {i}") for i in range(count)], [injector] * count, [model] * count


def _adapter() -> tuple[Any, Injector, nn.Module]:
    torch.manual_seed(0)
    model, injector = Net().eval(), Injector()
    branch = MAEBranch.attach(model, "encoder")
    plain = branch.loss

    def loss(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        value = plain(images, generator=generator)
        kind = injector.due("NaN loss", "infinite loss", "loss spike", "out of memory", "interrupt in a step")
        if kind == "out of memory":
            raise torch.OutOfMemoryError("as the fault says")
        if kind == "interrupt in a step":
            raise KeyboardInterrupt
        by = {"NaN loss": math.nan, "loss spike": 1e4}.get(kind, 1.0)
        return value + math.inf if kind == "infinite loss" else value * by

    def predict(x: Tensor) -> Tensor:
        kind = injector.due("spoilt statistics", "error in a prediction")
        if kind == "error in a prediction":
            raise ValueError("as the fault says")
        return model(x * 1e30 if kind else x)

    branch.loss = loss  # type: ignore[method-assign]
    adapter = StreamAdapter(
        model,
        branch,
        config=CONFIG,
        preprocess=NORMALIZE,
        predict=predict,
        optimizer=lambda groups: Optimizer(groups, injector),
    )
    return adapter, injector, model


# ---- faults


@dataclass
class Watched:
    """A camera and its stream.

    Attributes:
        name: of the camera.
        stream: what takes its frames.
        camera: where they come from.
        injector: what makes steps fail.
        model: that the stream is over.
        reasons: how often each reason stood in a report.
        digest: of all predictions.
        calm: ordinary frames since the last fault.
        bad: what went wrong.
    """

    name: str
    stream: Any
    camera: Camera
    injector: Injector
    model: nn.Module
    reasons: Counter[str] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)
    frames: int = 0
    calm: int = 0
    bad: list[str] = field(default_factory=list)

    def step(self, frame: Any) -> str:
        """The reason that a frame gets; its prediction has to be finite."""
        output = self.stream.step(frame)
        self.frames += 1
        if not bool(output.isfinite().all()):
            self.bad.append("a prediction is not finite")
        self.digest.update(output.numpy().tobytes())
        reason = self.stream.last.reason
        self.reasons.update(self.stream.last.reasons)
        return reason

    def ordinary(self, count: int = 1) -> None:
        """Ordinary frames, at which no guard may act."""
        for _ in range(count):
            if reason := self.step(self.camera.read()):
                self.bad.append(f"an ordinary frame has the reason {reason}")
            self.calm += 1


Fault = Callable[[Watched], bool]
"""Happens to a camera; returns whether what was seen of it is what has to be seen."""


def refused(frame: Callable[[np.ndarray], Any]) -> Fault:
    """A frame that cannot be used."""
    return lambda watched: _fails(watched, frame(watched.camera.read()), TTTAdaptError)


def breaks(kind: str, error: type[BaseException]) -> Fault:
    """An error inside of a step."""

    def happen(watched: Watched) -> bool:
        watched.injector.armed = kind
        return _fails(watched, watched.camera.read(), error)

    return happen


def _fails(watched: Watched, frame: Any, error: type[BaseException]) -> bool:
    """Whether a frame ends in this error, and the stream is where it was."""
    before = watched.stream.stats()
    try:
        watched.stream.step(frame)
    except error:
        after = watched.stream.stats()
        return (after.frames, after.skipped, after.interventions) == (
            before.frames,
            before.skipped,
            before.interventions,
        )
    return False


def seen(kind: str, reason: str, least_calm: int = 0) -> Fault:
    """A fault inside of a step that the report of this frame names."""

    def happen(watched: Watched) -> bool:
        watched.ordinary(max(0, least_calm - watched.calm))
        watched.injector.armed = kind
        return reason in watched.step(watched.camera.read())

    return happen


def collapsed(watched: Watched) -> bool:
    """Weights that see one class everywhere: they are taken back after some frames."""
    watched.injector.armed = "collapsed weights"
    reasons = [watched.step(watched.camera.read()) for _ in range(17)]
    return [reason for reason in reasons if reason] == ["rolled back: class collapse"]


def shows(frames: Callable[[Camera], Iterator[np.ndarray]], reason: str, count: int) -> Fault:
    """A camera that shows nothing new."""

    def happen(watched: Watched) -> bool:
        found = [watched.step(frame) for frame in frames(watched.camera)]
        return found.count(reason) == count == len([each for each in found if each])

    return happen


def black(camera: Camera) -> Iterator[np.ndarray]:
    """A covered lens."""
    yield from [np.zeros_like(camera.read())] * 8


def white(camera: Camera) -> Iterator[np.ndarray]:
    """A blinded camera."""
    yield from [np.full_like(camera.read(), 255)] * 8


def frozen(camera: Camera) -> Iterator[np.ndarray]:
    """A camera that hangs."""
    yield from [camera.read()] * 105


def cut(watched: Watched) -> bool:
    """Another scene."""
    watched.ordinary(max(0, 12 - watched.calm))
    before = watched.stream.stats().cuts
    watched.camera.cut()
    reason = watched.step(watched.camera.read())
    return watched.stream.stats().cuts == before + 1 and reason == "cut"


@contextmanager
def _changed(model: nn.Module, kind: str) -> Iterator[None]:
    head: Any = model.get_submodule("head")
    value = head.weight.detach().clone()
    if kind == "mode":
        model.train()
    else:
        with torch.no_grad():
            head.weight.add_(1.0)
    try:
        yield
    finally:
        model.eval()
        with torch.no_grad():
            head.weight.copy_(value)


def changed(kind: str) -> Fault:
    """Somebody else changes the model; the stream goes on once this is undone."""

    def happen(watched: Watched) -> bool:
        with _changed(watched.model, kind):
            return _fails(watched, watched.camera.read(), TTTAdaptError)

    return happen


def as_floats(frame: np.ndarray, value: float) -> Tensor:
    """A frame as the model takes it, with one value in a corner."""
    x = NORMALIZE(frame)
    x[..., 0, 0] = value
    return x


FAULTS: dict[str, Fault] = {
    "no frame": refused(lambda frame: None),
    "NaN in a frame": refused(lambda frame: as_floats(frame, math.nan)),
    "infinity in a frame": refused(lambda frame: as_floats(frame, math.inf)),
    "wrong size": refused(lambda frame: np.ascontiguousarray(frame[:16])),
    "wrong dtype": refused(lambda frame: frame.astype(np.int32)),
    "four channels": refused(lambda frame: np.dstack([frame, frame[..., :1]])),
    "empty": refused(lambda frame: frame[:0]),
    "black": shows(black, "blank", 4),
    "white": shows(white, "blank", 4),
    "frozen": shows(frozen, "frozen", 4),
    "cut": cut,
    "out of memory": breaks("out of memory", MemoryError),
    "interrupt in a step": breaks("interrupt in a step", KeyboardInterrupt),
    "NaN loss": seen("NaN loss", "non-finite gradient"),
    "infinite loss": seen("infinite loss", "non-finite loss"),
    "loss spike": seen("loss spike", "loss spike", least_calm=14),
    "spoilt statistics": seen("spoilt statistics", "non-finite statistics"),
    "NaN weights": seen("NaN weights", "rolled back: non-finite"),  # of weights or of a prediction
    "collapsed weights": collapsed,
    "mode changed outside": changed("mode"),
    "weights changed outside": changed("weights"),
}  # fmt: skip


def watched_streams(streams: int, untouched: int, over: str) -> list[Watched]:
    """Cameras with their streams; the last `untouched` ones meet no fault."""
    opened = zip(*open_streams(streams + untouched, over), strict=True)
    return [Watched(f"camera {i}", each, Camera(i), by, model) for i, (each, by, model) in enumerate(opened)]


def run(faults: int, streams: int, untouched: int, seed: int, over: str = "many") -> dict[str, Any]:
    """Inject faults, and compare what was seen with what has to be seen.

    Args:
        faults: how many.
        streams: how many cameras meet them.
        untouched: how many more cameras meet none.
        seed: of the order of faults and turns.
        over: "many" models or "one".
    """
    begun, random = time.perf_counter(), np.random.default_rng(seed)
    watched = watched_streams(streams, untouched, over)
    names = [*FAULTS] * (faults // len(FAULTS)) + [*FAULTS][: faults % len(FAULTS)]
    random.shuffle(names)
    for each in watched:
        each.ordinary(10)
    missed: list[str] = []
    for number, name in enumerate(names):
        target = watched[random.integers(streams)]
        for i in random.permutation(len(watched)):
            watched[i].ordinary(int(random.integers(2)))
        if not FAULTS[name](target):
            last = target.stream.last
            missed.append(f"fault {number}, {name} at {target.name}: {last and last.reason!r}")
        target.calm = 0
        target.ordinary()
    counted = all(each.reasons == Counter(each.stream.stats().interventions) for each in watched)
    total = all(each.frames == each.stream.stats().frames for each in watched)
    return {
        "faults": len(names),
        "kinds": dict(Counter(names)),
        "accounted": len(names) - len(missed),
        "missed": missed,
        "troubles": [f"{each.name}: {trouble}" for each in watched for trouble in each.bad],
        "counts_agree": counted and total,
        "interventions": dict(sum((each.reasons for each in watched), Counter[str]())),
        "untouched_equal": [each.digest.hexdigest() for each in watched[streams:]] == alone(watched, streams, over),
        "streams": streams,
        "untouched": untouched,
        "frames": sum(each.frames for each in watched),
        "over": over,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def alone(watched: list[Watched], streams: int, over: str) -> list[str]:
    """Digests of the predictions of the untouched cameras in a run in which nobody meets a fault."""
    again = watched_streams(streams, len(watched) - streams, over)[streams:]
    for before, now in zip(watched[streams:], again, strict=True):
        now.ordinary(before.frames)
    return [each.digest.hexdigest() for each in again]


def main() -> int:
    """The command; 1 where a fault was missed or did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=6, help="cameras that meet faults")
    parser.add_argument("--untouched", type=int, default=2, help="cameras that meet none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--over", choices=("many", "one"), default="many", help="a model for each camera, or one for all"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    given = vars(parser.parse_args())
    out = given.pop("out")
    result = run(**given)
    text = json.dumps({**result, "environment": environment()}, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    sound = not result["missed"] and not result["troubles"] and result["counts_agree"] and result["untouched_equal"]
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
