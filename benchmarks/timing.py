"""What the benchmarks of cost share: steps timed in turns, peak speeds of devices, results as JSON and as a table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ttt_adapt.evaluation.environment import environment

Step = Callable[[Tensor], Any]

# Dense peak in TFLOP/s, from NVIDIA's data sheets (SXM): float32 outside of tensor cores, TF32 and bfloat16 inside.
PEAK = {
    "H100": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
    "H200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
}


def device_name() -> str:
    """The GPU's name, or "CPU" with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"


def peak_flops(precision: str) -> float | None:
    """The device's peak in FLOP/s at a precision; None for devices that the table does not know."""
    name = device_name()
    return next((1e12 * peak[precision] for key, peak in PEAK.items() if key in name), None)


def interleaved(
    steps: Mapping[str, Step],
    frames: Iterable[Any],
    warm_up: int | None = None,
    middle: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median ms of each step, in turns on the same frames; the first frames (a fifth, or `warm_up`) do not count.

    `middle` is the mean for steps that do their work on some frames only.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i, frame in enumerate(frames):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = now()
            steps[name](frame)
            times[name].append((now() - started) * 1e3)
    first = max(1, len(times[names[0]]) // 5) if warm_up is None else warm_up
    return {name: middle(values[first:]) for name, values in times.items()}


def now() -> float:
    """Seconds.

    With one CPU thread, processor time, which other programs do not change; else clock time, after the GPU has
    finished.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def flops(call: Callable[[], Any]) -> int:
    """Floating point operations of a call, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    """Rows with the device and the environment, as JSON."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": device_name(), "environment": environment(), "rows": rows}
        out.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
