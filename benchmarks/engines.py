"""What an online step costs on each engine and at each precision, against the model that does not adapt.

    python benchmarks/engines.py --out benchmarks/results/engines-h100.json    # on a GPU: the full grid
    python benchmarks/engines.py                                               # on the CPU: small models and frames

For each model and batch size, in turns on the same frames, uint8 on the host: the plain eager float32 forward pass that
users run today (`fixed`), the same model compiled at the precision of the row (`fixed_compiled`), and
`StreamAdapter.step` on each engine. `to_fixed` is the ratio of the fastest engine to the first, `to_best` that to the
faster of the two. `gflop` is counted by PyTorch: three times the masked forward pass of the batch (a backward pass
costs two), and the prediction; `share` is the part of the device's peak that the fastest engine reaches. Every step
runs until windows are full and everything is compiled or recorded; one that fails there is reported with its
reason, and costs the others nothing. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from timing import Step, device_name, flops, interleaved, peak_flops, table, write
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.engine.precision import both_passes, forward_pass
from ttt_adapt.tasks.dense_model import DenseModel

GPU = torch.cuda.is_available()
MODELS = (
    ["vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224",
     "resnet50"]
    if GPU
    else ["vit_tiny_patch16_224", "resnet18"]
)  # fmt: skip
SIZE = (512, 1024) if GPU else (128, 160)
BATCHES = [1, 4, 8, 32] if GPU else [1, 4]
PRECISIONS = ["fp32", "tf32", "bf16"] if GPU else ["fp32"]
ENGINES = ["eager", "compile", "cudagraph"]
DEVICE = "cuda" if GPU else "cpu"
STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARM = StreamConfig.online().capacity + 4
"""Frames until windows are full and an engine has recorded what it records."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    sized = {} if name.startswith("resnet") else {"img_size": SIZE}
    return DenseModel(name, 19, encoder_options=sized).eval().to(DEVICE)


def fixed(name: str, precision: str, best: bool) -> Step:
    """The model by itself; compiled, and at a precision, if it is to be as fast as it can."""
    model, normalize = build(name), Normalize(*STATISTICS, device=DEVICE)
    run = torch.compile(model, mode="reduce-overhead" if GPU else None) if best else model
    precision = precision if best else "fp32"

    def forward(frame: np.ndarray) -> Any:
        with torch.no_grad(), both_passes(precision), forward_pass(precision, torch.device(DEVICE)):
            return run(normalize(frame))

    return forward


def online(name: str, engine: str, precision: str, batch: int) -> Step:
    config = StreamConfig.online(engine=engine, precision=precision, batch_size=batch)
    normalize = Normalize(*STATISTICS, device=DEVICE)
    return StreamAdapter(build(name), encoder="backbone", config=config, preprocess=normalize).step


def warmed(
    steps: Mapping[str, Callable[[], Step]], frames: Sequence[np.ndarray]
) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that could be made and run on the frames, and why the others could not."""
    ready, refused = {}, {}
    for name, make in steps.items():
        try:
            step = make()
            for frame in frames:
                step(frame)
            ready[name] = step
        except (TTTAdaptError, RuntimeError, MemoryError) as error:
            refused[f"{name}_refused"] = f"{type(error).__name__}: {error}"
            gc.collect()
    return ready, refused


def step_flops(name: str, batch: int) -> float:
    """Three masked forward passes of the batch, and a prediction."""
    model = build(name)
    branch = MAEBranch.attach(model, "backbone")
    images = torch.zeros(1, 3, *SIZE, device=DEVICE)
    with torch.no_grad():
        return 3.0 * batch * flops(lambda: branch.loss(images)) + flops(lambda: model(images))


def measure(name: str, batch: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    makers: dict[str, Callable[[], Step]] = {"fixed": partial(fixed, name, "fp32", False)}
    if "compile" in options.engines:
        makers["fixed_compiled"] = partial(fixed, name, precision, True)
    makers |= {engine: partial(online, name, engine, precision, batch) for engine in options.engines}
    frames = np.random.default_rng(0).integers(0, 256, (options.frames, *SIZE, 3), dtype=np.uint8)
    steps, refused = warmed(makers, frames[np.arange(WARM) % len(frames)])
    ms = interleaved(steps, frames, warm_up=1)
    row: dict[str, Any] = {"model": name, "batch": batch, "precision": precision, **refused}
    row["gflop"] = step_flops(name, batch) / 1e9
    found = {engine: ms[engine] for engine in options.engines if engine in ms}
    if found and "fixed" in ms:
        engine = min(found, key=lambda name: found[name])
        row |= {"best": engine, "to_fixed": found[engine] / ms["fixed"]}
        row["to_best"] = found[engine] / min(ms[name] for name in ("fixed", "fixed_compiled") if name in ms)
        peak = peak_flops(precision)
        row["share"] = row["gflop"] * 1e9 / (found[engine] / 1e3) / peak if peak else None
    ratios = {f"{engine}_to_eager": value / ms["eager"] for engine, value in found.items() if "eager" in ms}
    return {**row, **ratios, "ms": ms}


def grid(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.models:
        for precision in options.precisions:
            for batch in options.batches:
                yield measure(name, batch, precision, options)
                torch._dynamo.reset()
                gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in grid(options):
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write(options.out, rows)
    ratios = [f"{engine}_to_eager" for engine in options.engines]
    print(f"\n{device_name()}, frames of {SIZE[0]} x {SIZE[1]}\n")
    print(table(rows, ["model", "batch", "precision", "gflop", "best", "to_fixed", "to_best", "share", *ratios]))


if __name__ == "__main__":
    main()
