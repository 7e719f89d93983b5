"""What an online step costs on each engine and at each precision, against the model that does not adapt.

    python benchmarks/engines.py --out benchmarks/results/engines-h100.json    # on a GPU: the full grid
    python benchmarks/engines.py                                               # on the CPU: small models and frames

For each model and batch size, in turns on the same frames: the plain eager float32 forward pass that users run today
(`fixed`), the same model compiled at the precision of the row (`fixed_best`), and `StreamAdapter.step` on each engine.
`to_fixed` and `to_best` are ratios to these two. `gflop` is counted by PyTorch: three times the masked forward pass of
the batch (a backward pass costs two), and the prediction; `share` is the part of the device's peak that the fastest
engine reaches. What an engine refuses is reported with its reason. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timing import Step, device_name, flops, interleaved, peak_flops, table, write
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.models import SegmentationModel

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


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    sized = {} if name.startswith("resnet") else {"img_size": SIZE}
    return SegmentationModel(name, 19, encoder_options=sized).eval().to("cuda" if GPU else "cpu")


def fixed(name: str, precision: str, best: bool) -> Step:
    """The model by itself; compiled, and at a precision, if it is to be as fast as it can."""
    model = build(name)
    run = torch.compile(model, mode="reduce-overhead" if GPU else None) if best else model

    def forward(frame: Tensor) -> Any:
        tf32 = best and precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.no_grad(), torch.autocast(frame.device.type, torch.bfloat16, enabled=best and precision == "bf16"):
            out = run(frame[None])
        torch.backends.cuda.matmul.allow_tf32 = False
        return out

    return forward


def online(name: str, engine: str, precision: str, batch: int) -> Step:
    model = build(name)
    config = StreamConfig.online(engine=engine, precision=precision, batch_size=batch)
    return StreamAdapter(model, encoder="backbone", config=config).step


def step_flops(name: str, batch: int) -> float:
    """Three masked forward passes of the batch, and a prediction."""
    model = build(name)
    branch = MAEBranch.attach(model, "backbone")
    images = torch.zeros(1, 3, *SIZE, device="cuda" if GPU else "cpu")
    with torch.no_grad():
        return 3.0 * batch * flops(lambda: branch.loss(images)) + flops(lambda: model(images))


def measure(name: str, batch: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    steps = {"fixed": fixed(name, "fp32", False)}
    if "compile" in options.engines:
        steps["fixed_best"] = fixed(name, precision, True)
    row: dict[str, Any] = {"model": name, "batch": batch, "precision": precision}
    for engine in options.engines:
        try:
            steps[engine] = online(name, engine, precision, batch)
        except TTTAdaptError as error:
            row[f"{engine}_refused"] = str(error)
    frames = torch.randn(options.frames, 3, *SIZE, device="cuda" if GPU else "cpu")
    ms = interleaved(steps, frames, warm_up=max(3, options.frames // 4))
    row["gflop"] = step_flops(name, batch) / 1e9
    found = {engine: ms[engine] for engine in options.engines if engine in ms}
    if found:
        engine = min(found, key=lambda name: found[name])
        row |= {"best": engine, "to_fixed": found[engine] / ms["fixed"]}
        row["to_best"] = found[engine] / ms["fixed_best"] if "fixed_best" in ms else None
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
