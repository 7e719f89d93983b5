"""How the cost of a step grows: with the frame, the window, the batch, the model, the stream's length, their number.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

One axis at a time from a common middle. All points of an axis are timed in turns, and reported relative to the axis'
first point (`relative`) and to the same model's plain forward pass on the same frame (`to_forward`). Window, stream
length and number of streams (each with a model of its own; the cost is per frame) are promised to be flat. Last comes
a batch of 32, whole and in the two ways to fit it into less memory, with the MiB that a step takes beside model, source
weights and optimizer, in a process of its own (`peak`). On a GPU the middle is larger. Weights are random: they do not
change the cost.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timing import Step, device_name, interleaved, now, table, write
from ttt_adapt import StreamAdapter, StreamConfig
from ttt_adapt.evaluation.peak_memory import PeakMemory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MIDDLE = {"model": "vit_small_patch16_224" if GPU else "vit_tiny_patch16_224", "size": (128, 160), "batch": 2}
SIZES = [(64, 80), (128, 160), (256, 320)]
WINDOWS = [1, 4, 16, 64]
BATCHES = [1, 2, 4, 8]
MODELS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]
STREAMS = [1, 2, 4]
LARGE = {"batch": 32, "window": 1}
LARGE_MODELS = [MIDDLE["model"], "resnet50"]
IN_LESS_MEMORY: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro_batch=4": {"micro_batch": 4},
    "grad_checkpointing": {"grad_checkpointing": True},
}


def build(model: str, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": size} if model.startswith("vit") else {}
    return timm.create_model(model, num_classes=10, **options).eval().to(DEVICE)


def adapter(model: str, size: tuple[int, int], batch: int, window: int = 16, **changes: Any) -> Step:
    """A stream whose window is full."""
    config = StreamConfig.online(window=window, batch_size=batch, **changes)
    encoder = "norm" if model.startswith("vit") else "layer4"
    made = StreamAdapter(build(model, size), encoder=encoder, config=config)
    for frame in torch.randn(window, 3, *size, device=DEVICE):
        made.adapt(frame)
    return made.step


def forward(model: str, size: tuple[int, int]) -> Step:
    plain = build(model, size)

    def run(frame: Tensor) -> Any:
        with torch.no_grad():
            return plain(frame[None])

    return run


def cropped(step: Step, size: tuple[int, int]) -> Step:
    return lambda frame: step(frame[:, : size[0], : size[1]].contiguous())


def axis(name: str, points: list[dict[str, Any]], frames: int) -> Iterator[dict[str, Any]]:
    """One row per point; a point is what differs from the middle."""
    steps: dict[str, Step] = {}
    for i, point in enumerate(points):
        made = {**MIDDLE, **point}
        plain = {"model": made["model"], "size": made["size"]}
        steps[f"step {i}"] = cropped(adapter(**made), made["size"])
        steps[f"forward {i}"] = cropped(forward(**plain), made["size"])
    largest = max((p.get("size", MIDDLE["size"]) for p in points), key=lambda size: size[0])
    ms = interleaved(steps, torch.randn(frames, 3, *largest, device=DEVICE))
    for i, point in enumerate(points):
        value = "x".join(map(str, point["size"])) if "size" in point else str(next(iter(point.values())))
        relative = ms[f"step {i}"] / ms["step 0"]
        row = {"axis": name, "value": value, "relative": relative, "to_forward": ms[f"step {i}"] / ms[f"forward {i}"]}
        yield {**row, "ms": ms[f"step {i}"]}


def length(frames: int) -> Iterator[dict[str, Any]]:
    """One stream of 10 x `frames`: the first tenth against the last, each beside forward passes."""
    step, plain = adapter(**MIDDLE), forward(MIDDLE["model"], MIDDLE["size"])  # type: ignore[arg-type]
    times: list[tuple[float, float]] = []
    for _ in range(10 * frames):
        frame, marks = torch.randn(3, *MIDDLE["size"], device=DEVICE), [now()]  # type: ignore[misc]
        for call in (step, plain):
            call(frame)
            marks.append(now())
        times.append((1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1])))
    first = None
    for name, part in (("first tenth", times[3:frames]), ("last tenth", times[-frames:])):
        ms, base = (statistics.median(column) for column in zip(*part, strict=True))
        first = first or ms / base
        # relative to the forward passes beside it: minutes lie between the two
        yield {"axis": "stream length", "value": name, "relative": ms / base / first, "to_forward": ms / base, "ms": ms}


def streams(frames: int) -> Iterator[dict[str, Any]]:
    """n adapters in turns in one process; the cost of one frame of one of them."""
    steps: dict[str, Step] = {"forward": forward(MIDDLE["model"], MIDDLE["size"])}  # type: ignore[arg-type]
    for n in STREAMS:
        group = [adapter(**MIDDLE) for _ in range(n)]  # type: ignore[arg-type]

        def all_of_them(frame: Tensor, group: list[Step] = group) -> None:
            for step in group:
                step(frame)

        steps[str(n)] = all_of_them
    ms = interleaved(steps, torch.randn(frames, 3, *MIDDLE["size"], device=DEVICE))  # type: ignore[misc]
    for n in STREAMS:
        each, first = ms[str(n)] / n, ms[str(STREAMS[0])] / STREAMS[0]
        row = {"axis": "streams", "value": str(n), "relative": each / first, "to_forward": each / ms["forward"]}
        yield {**row, "ms": each}


def less_memory(model: str, frames: int) -> Iterator[dict[str, Any]]:
    """A large batch: what it costs to keep less of it."""
    point: dict[str, Any] = {**MIDDLE, **LARGE, "model": model}
    steps = {name: adapter(**point, **changes) for name, changes in IN_LESS_MEMORY.items()}
    steps["forward"] = forward(model, point["size"])
    ms = interleaved(steps, torch.randn(frames, 3, *point["size"], device=DEVICE))
    for name in IN_LESS_MEMORY:
        command = [sys.executable, __file__, "--peak", model, name]
        found = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        row = {"axis": f"batch of 32, {model}", "value": name, "relative": ms[name] / ms["whole"], "peak": found}
        yield {**row, "to_forward": ms[name] / ms["forward"], "ms": ms[name]}


def peak(model: str, name: str) -> float:
    """MiB that a step on a large batch takes beside model, source weights and optimizer."""
    point: dict[str, Any] = {**MIDDLE, **LARGE, "model": model, **IN_LESS_MEMORY[name]}
    frames = torch.randn(2, 3, *point["size"], device=DEVICE)
    step = adapter(**point)
    with PeakMemory(torch.device(DEVICE)) as memory:
        for frame in frames:
            step(frame)
    assert memory.mib is not None, "this system does not say what a process holds"
    return memory.mib


def rows_of(frames: int) -> Iterator[dict[str, Any]]:
    yield from axis("frame size", [{"size": size} for size in SIZES], frames)
    yield from axis("window", [{"window": window} for window in WINDOWS], frames)
    yield from axis("batch", [{"batch": batch} for batch in BATCHES], frames)
    yield from axis("model", [{"model": model} for model in MODELS], frames)
    yield from length(frames)
    yield from streams(frames)
    for model in LARGE_MODELS:
        yield from less_memory(str(model), frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(*options.peak))
        return
    rows: list[dict[str, Any]] = []
    for row in rows_of(options.frames):
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write(options.out, rows)
    print(f"\n{device_name()}\n\n{table(rows, ['axis', 'value', 'relative', 'to_forward', 'peak'])}")


if __name__ == "__main__":
    main()
