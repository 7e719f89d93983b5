"""What one online step of the paper's own model costs: Mask2Former Swin-S with the copied head as decoder.

    python benchmarks/mask2former_step.py                                  # the CPU, or the GPU where there is one
    python benchmarks/mask2former_step.py --size 128 256 --batches 1 2 4   # smaller

A frame is adapted to and predicted, and the plain model predicts it in turn; medians over `--frames` frames after one
to warm up. Each batch size runs in a process of its own, so that its peak memory is its own. The parts of a step:
encoder and decoder (the masked forward pass), backward, optimizer, predict. Weights are random: they do not change the
cost.
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


def build(size: tuple[int, int], device: torch.device) -> tuple[nn.Module, Any]:
    """The segmentor in eval mode, and its branch."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import ttt_adapt_openmmlab

    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(f"_base_ = ['{CONFIG}']\nmodel = dict(backbone=dict(init_cfg=None))\n")
        file.flush()
        config = Config.fromfile(file.name)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(config.model).to(device).eval()
    return model, ttt_adapt_openmmlab.branch_for(model, encoder="backbone", decoder="copy_head", image_size=size)


def measure(size: tuple[int, int], batch: int, frames: int, device: torch.device) -> dict[str, float]:
    """Medians in milliseconds, and peak memory in MiB, for one batch size."""
    from mmseg.structures import SegDataSample

    from ttt_adapt import StreamAdapter, StreamConfig

    clock = Clock(device)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(groups, fused=True)
        made.register_step_pre_hook(clock.stop("backward"))
        made.register_step_post_hook(clock.stop("optimizer"))
        return made

    model, branch = build(size, device)
    config = StreamConfig.online(batch_size=batch, source_pull=0.0)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "predict", "step", "forward")}
    meta = [SegDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size})]

    def predict(x: torch.Tensor) -> Any:
        return model.predict(x, meta)

    with StreamAdapter(model, branch, config=config, optimizer=optimizer, predict=predict) as adapter:
        for index in range(frames + 1):
            frame = torch.randn(1, 3, *size, device=device)
            begun = time.perf_counter()
            handles = [
                model.backbone.register_forward_pre_hook(clock.start),
                model.backbone.register_forward_hook(clock.stop("encoder")),
                branch.decoder.register_forward_hook(clock.stop("decoder")),
            ]
            adapter.adapt(frame)
            for handle in handles:
                handle.remove()
            clock.start()
            adapter.predict(frame)
            clock.stop("predict")()
            step = 1e3 * (time.perf_counter() - begun)
            clock.start()
            with torch.no_grad():
                predict(frame)
            clock.stop("forward")()
            if index:
                for name, values in found.items():
                    values.append(step if name == "step" else clock.ms[name])
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {name: statistics.median(values) for name, values in found.items()} | {"peak_mib": peak}


def in_own_process(options: argparse.Namespace, batch: int) -> dict[str, float] | str:
    """The measurement of one batch size, or why there is none."""
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
    if options.only:
        print(json.dumps(measure(tuple(options.size), options.only, options.frames, torch.device(options.device))))
        return
    from ttt_adapt.evaluation.report import environment

    report: dict[str, Any] = {"environment": environment(), "size": options.size, "batches": {}}
    columns = (*PARTS, "predict", "step", "forward")
    print("| batch | " + " | ".join(f"{name} ms" for name in columns) + " | step / forward | peak MiB |")
    print("|---:|" + "---:|" * (len(columns) + 2))
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
