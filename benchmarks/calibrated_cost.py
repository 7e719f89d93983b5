"""What calibration costs: corrected passes, and gated gradient steps, against fixed passes of the same model.

    python benchmarks/calibrated_cost.py --out benchmarks/results/calibrated_cost.json

Both are taken in turns in one run. `ratio` is the median over the frames of calibrated time by fixed time, and `gated`
that of `adapter.step` with `gate="calibrated"`, on frames like the stills: nearly all are usual and skip the gradient
step. With one thread it is processor time, which other programs on the machine hardly change; with more it is clock
time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timing import now, table, write
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.correction import correction
from ttt_adapt.model.measure import measure, take_stills, with_drifts
from ttt_adapt.model.rule import Rule
from ttt_adapt.tasks.dense_model import DenseModel

SIZE = (192, 256)
SWIN = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16), "img_size": SIZE}
ENCODERS = {"VisionTransformer": "norm"}
"""Type of a model -> where its encoder ends, unless it is its `backbone`."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "tf_efficientnet_lite0": lambda: DenseModel("tf_efficientnet_lite0", 11),
    "resnet18": lambda: DenseModel("resnet18", 11),
    "convnext_atto": lambda: DenseModel("convnext_atto", 11),
    "swin, 48 wide": lambda: DenseModel("swin_tiny_patch4_window7_224", 11, encoder_options=SWIN),
    "vit_tiny, 6 deep": lambda: timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=11, depth=6),
}


def rows(names: list[str], threads: int, frames: int) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(threads)
    for name in names:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        stills = take_stills(model, [torch.randn(3, *SIZE) for _ in range(20)])
        measured = measure(model, stills)
        for points in (measured.rule.points, f"input+{measured.rule.points}"):
            calibration = measured.replace(rule=Rule(points))
            ms = costs(model, calibration, torch.randn(frames, 1, 3, *SIZE) * 0.5)
            ms["gated"] = gated(model, with_drifts(model, calibration, stills), torch.randn(frames, 3, *SIZE))
            where = f"{len(measured.points)} {measured.rule.points}" + " + image" * points.startswith("input")
            yield {"model": name, "threads": threads, "points": where, "frames": frames, **ms}


def costs(model: nn.Module, calibration: Calibration, frames: Tensor) -> dict[str, float]:
    """Of fixed and corrected passes of one model over the frames."""
    corrected = correction(model, calibration)

    def fixed(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    def calibrated(x: Tensor) -> None:
        with torch.no_grad(), corrected.active():
            model(x)

    return paired(fixed, calibrated, frames)


def gated(model: nn.Module, calibration: Calibration, frames: Tensor) -> float:
    """Median ratio of a gated step by a fixed pass."""
    with MAEBranch.attach(model, ENCODERS.get(type(model).__name__, "backbone"), patch_size=16) as branch:
        config = StreamConfig.online(gate="calibrated")
        with StreamAdapter(model, branch, config=config, calibration=calibration) as adapter:

            def fixed(x: Tensor) -> None:
                with torch.no_grad():
                    model(x[None])

            return paired(fixed, adapter.step, frames)["ratio"]


def paired(one: Callable[[Tensor], None], two: Callable[[Tensor], None], frames: Tensor) -> dict[str, float]:
    """Median ms of both, and the median of their ratio; who goes first alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for i, frame in enumerate(frames):
        for which in (0, 1) if i % 2 else (1, 0):
            started = now()
            (one, two)[which](frame)
            times[which].append((now() - started) * 1e3)
    fixed, corrected = (values[len(frames) // 5 :] for values in times)
    ratio = statistics.median(b / a for a, b in zip(fixed, corrected, strict=True))
    return {"fixed": statistics.median(fixed), "calibrated": statistics.median(corrected), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for threads in options.threads:
        for row in rows(options.models, threads, options.frames):
            found.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            write(options.out, found)
    print(table(found, ["model", "threads", "points", "fixed", "calibrated", "ratio", "gated"]))


if __name__ == "__main__":
    main()
