"""What one online step of the paper's own model costs: Mask2Former Swin-S with the copied head as decoder.

    python benchmarks/mask2former_step.py                                  # the CPU, or the GPU where there is one
    python benchmarks/mask2former_step.py --size 128 256 --batches 1 2 4   # smaller

A frame is adapted to by the online preset and predicted, and the plain model predicts it in turn; medians over
`--frames` frames after one to warm up. Each batch size, and plain inference by itself, runs in a process of its own, so
that its peak memory is its own. The parts of a step: encoder and decoder (the masked forward pass), backward,
optimizer, predict. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG = "mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py"
PARTS = ("encoder", "decoder", "backward", "optimizer")


class Clock:
    """Milliseconds between events of one step, through hooks of the modules and the optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ms: dict[str, float] = {}
        self._last = 0.0

    def start(self, *_: Any) -> None:
        self._last = self._now()

    def stop(self, part: str) -> Any:
        def hook(*_: Any) -> None:
            now = self._now()
            self.ms[part] = 1e3 * (now - self._last)
            self._last = now

        return hook

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def build(device: torch.device) -> nn.Module:
    """The segmentor in eval mode."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import ttt_adapt_openmmlab  # noqa: F401  # registers the models' names

    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(f"_base_ = ['{CONFIG}']\nmodel = dict(backbone=dict(init_cfg=None))\n")
        file.flush()
        config = Config.fromfile(file.name)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    return MODELS.build(config.model).to(device).eval()


def predictor(model: nn.Module, size: tuple[int, int]) -> Callable[[torch.Tensor], Any]:
    """How the segmentor is called on one frame."""
    from mmseg.structures import SegDataSample

    meta = [SegDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size})]
    return lambda x: model.predict(x, meta)


def measure_plain(size: tuple[int, int], frames: int, device: torch.device) -> dict[str, float]:
    """Plain inference: the median in milliseconds, and peak memory in MiB."""
    clock, found = Clock(device), []
    predict = predictor(build(device), size)
    for _ in range(frames + 1):
        frame = torch.randn(1, 3, *size, device=device)
        clock.start()
        with torch.no_grad():
            predict(frame)
        clock.stop("forward")()
        found.append(clock.ms["forward"])
    return {"forward": statistics.median(found[1:]), "peak_mib": peak_mib(device)}


def measure(size: tuple[int, int], batch: int, frames: int, device: torch.device) -> dict[str, float]:
    """Online steps: medians in milliseconds, and peak memory in MiB, for one batch size."""
    from ttt_adapt import StreamAdapter, StreamConfig
    from ttt_adapt_openmmlab import branch_for

    clock = Clock(device)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(groups, fused=True)
        made.register_step_pre_hook(clock.stop("backward"))
        made.register_step_post_hook(clock.stop("optimizer"))
        return made

    model = build(device)
    branch = branch_for(model, encoder="backbone", decoder="copy_head", image_size=size)
    predict, config = predictor(model, size), StreamConfig.online(batch_size=batch)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "predict", "step", "forward")}
    with StreamAdapter(model, branch, config=config, optimizer=optimizer, predict=predict) as adapter:
        for index in range(frames + 1):
            frame = torch.randn(1, 3, *size, device=device)
            one_step(adapter, frame, clock)
            clock.start()
            with torch.no_grad():
                predict(frame)
            clock.stop("forward")()
            if index:
                for name, values in found.items():
                    values.append(clock.ms[name])
    return {name: statistics.median(values) for name, values in found.items()} | {"peak_mib": peak_mib(device)}


def one_step(adapter: Any, frame: torch.Tensor, clock: Clock) -> None:
    """Adapt to a frame and predict it; the clock reads the parts and the whole."""
    begun = time.perf_counter()
    handles = [
        adapter.branch.model.backbone.register_forward_pre_hook(clock.start),
        adapter.branch.model.backbone.register_forward_hook(clock.stop("encoder")),
        adapter.branch.decoder.register_forward_hook(clock.stop("decoder")),
    ]
    adapter.adapt(frame)
    for handle in handles:
        handle.remove()
    clock.start()
    adapter.predict(frame)
    clock.stop("predict")()
    clock.ms["step"] = 1e3 * (time.perf_counter() - begun)


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_own_process(options: argparse.Namespace, batch: int) -> dict[str, float] | str:
    """The measurement of one batch size (0: of plain inference), or why there is none."""
    size = [str(side) for side in options.size]
    command = [sys.executable, __file__, "--only", str(batch), "--frames", str(options.frames), "--size", *size]
    done = subprocess.run([*command, "--device", options.device], capture_output=True, text=True)
    if done.returncode:
        reason = "out of memory" if done.returncode == -9 or "emory" in done.stderr else done.stderr.strip()[-300:]
        return reason or f"exit status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask2former_step.json")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only is not None:
        size, device = tuple(options.size), torch.device(options.device)
        batch = options.only
        found = measure(size, batch, options.frames, device) if batch else measure_plain(size, options.frames, device)
        print(json.dumps(found))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure all batch sizes and plain inference; a table to the screen, and a report to a file."""
    from ttt_adapt.evaluation.report import environment

    plain = in_own_process(options, 0)
    report: dict[str, Any] = {"environment": environment(), "size": options.size, "plain": plain, "batches": {}}
    columns = (*PARTS, "predict", "step", "forward")
    print("| batch | " + " | ".join(f"{name} ms" for name in columns) + " | step / forward | peak MiB |")
    print("|---:|" + "---:|" * (len(columns) + 2))
    if isinstance(plain, str):
        print(f"| plain | {plain} |")
    else:
        blank = " |" * (len(columns) - 1)
        print(f"| plain |{blank} {plain['forward']:.0f} | | {plain['peak_mib']:.0f} |")
    for batch in options.batches:
        found = report["batches"][batch] = in_own_process(options, batch)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        if isinstance(found, str):
            print(f"| {batch} | {found} |")
            break  # larger batches need more
        cells = [f"{found[name]:.0f}" for name in columns]
        ratio = found["step"] / found["forward"]
        print(f"| {batch} | {' | '.join(cells)} | {ratio:.1f} | {found['peak_mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
