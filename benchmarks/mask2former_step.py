"""What one online step of the paper's own model costs: Mask2Former Swin-S with the copied head as decoder.

    python benchmarks/mask2former_step.py                                  # the CPU, or the GPU where there is one
    python benchmarks/mask2former_step.py --size 128 256 --batches 1 2 4   # smaller
    python benchmarks/mask2former_step.py --batches 8 --micro-batch 2      # large batches in little memory
    python benchmarks/mask2former_step.py --paper --precision bf16         # the paper's recipe, for a GPU

With the online preset, the model adapts to a frame and predicts it; then the plain model predicts it. The times are
medians over `--frames` frames after one to warm up. Each batch size, and the plain model alone, runs in a process of
its own, so that its peak memory is its own. The parts of a step are encoder and decoder (the masked forward pass),
backward, optimizer and predict; on a GPU they are timed by CUDA events. Weights are random, which does not change the
cost.

`--paper` takes the paper's settings: window 16, 32 crops of 512 x 1024, prediction at 618 x 2048, its masks and loss.
The floor is the time that the matrix products and convolutions of a step, as PyTorch counts them, take at the rate of
one large matrix product of the same precision on the same device. Deformable attention, normalisation and softmax are
not counted.
"""

from __future__ import annotations

import argparse
import itertools
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

from timing import flops

CONFIG = "mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py"
PARTS = ("encoder", "decoder", "backward", "optimizer")


class Clock:
    """Milliseconds between moments of one step, through hooks of the modules and the optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str | None, Any]] = []

    def start(self, *_: Any) -> None:
        self._mark(None)

    def enter(self, *_: Any) -> None:
        """The encoder's forward pass begins. After a decoder's, the backward pass of a part of the batch has ended."""
        self._mark("backward" if self._marks and self._marks[-1][0] == "decoder" else None)

    def stop(self, part: str) -> Any:
        """A hook that ends `part`, which began at the moment before."""
        return lambda *_: self._mark(part)

    def read(self) -> dict[str, float]:
        """Milliseconds of each part since the last call; waits for the device."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        found: dict[str, float] = {}
        for (_, a), (part, b) in itertools.pairwise(marks):
            if part is not None:
                found[part] = found.get(part, 0.0) + (a.elapsed_time(b) if cuda else 1e3 * (b - a))
        return found

    def _mark(self, part: str | None) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))


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
    """A function that predicts one frame by the segmentor."""
    from mmseg.structures import SegDataSample

    meta = [SegDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size})]
    return lambda x: model.predict(x, meta)


def set_precision(name: str) -> None:
    """Let matrix products and convolutions run in float32, or in tf32; bf16 is set by the adapter's configuration."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"


def measure_plain(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Plain inference: the median in milliseconds, and peak memory in MiB."""
    clock, found, size = Clock(device), [], tuple(options.frame)
    predict = predictor(build(device), size)
    for _ in range(options.frames + 1):
        frame = torch.randn(1, 3, *size, device=device)
        clock.start()
        with torch.no_grad():
            predict(frame)
        clock.stop("forward")()
        found.append(clock.read()["forward"])
    return {"forward": statistics.median(found[1:]), "peak_mib": peak_mib(device)}


def measure(options: argparse.Namespace, batch: int, device: torch.device) -> dict[str, float]:
    """Online steps: medians in milliseconds, and peak memory in MiB, for one batch size."""
    from ttt_adapt import StreamAdapter
    from ttt_adapt_openmmlab import branch_for

    clock = Clock(device)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(groups, fused=True)
        made.register_step_pre_hook(clock.stop("backward"))
        made.register_step_post_hook(clock.stop("optimizer"))
        return made

    model, size = build(device), tuple(options.frame)
    branch = branch_for(
        model, encoder="backbone", decoder="copy_head", image_size=tuple(options.size), **branch_settings(options)
    )
    predict, config = predictor(model, size), stream_config(options, batch)
    found: dict[str, list[float]] = {name: [] for name in (*PARTS, "predict", "step", "forward")}
    with StreamAdapter(model, branch, config=config, optimizer=optimizer, predict=predict) as adapter:
        for index in range(options.frames + 1):
            frame = torch.randn(1, 3, *size, device=device)
            ms = one_step(adapter, frame, clock)
            clock.start()
            with torch.no_grad():
                predict(frame)
            clock.stop("forward")()
            ms |= clock.read()
            if index:
                for name, values in found.items():
                    values.append(ms[name])
        result = {name: statistics.median(values) for name, values in found.items()} | {"peak_mib": peak_mib(device)}
    with StreamAdapter(model, branch, config=stream_config(options, 1), predict=predict) as adapter:
        result |= floor(lambda: adapter.adapt(frame), lambda: adapter.predict(frame), batch, options.precision, device)
    return result | {"step_over_floor": result["step"] / result["floor_ms"]}


def branch_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Masks and loss: the library's defaults, or those of the paper's released code."""
    return {"mask_ratio": 0.85, "loss_on": "all"} if options.paper else {}


def stream_config(options: argparse.Namespace, batch: int) -> Any:
    """The preset at this batch size; crops where they are smaller than the frame."""
    from ttt_adapt import StreamConfig

    preset = StreamConfig.paper if options.paper else StreamConfig.online
    crop = tuple(options.size) if tuple(options.size) != tuple(options.frame) else None
    precision = "bf16" if options.precision == "bf16" else "fp32"
    micro = None if options.micro_batch is None else min(options.micro_batch, batch)
    return preset(batch_size=batch, window=16, crop_size=crop, precision=precision, micro_batch=micro)


def floor(
    adapt: Callable[[], Any], predict: Callable[[], Any], batch: int, precision: str, device: torch.device
) -> dict[str, float]:
    """Counted TFLOP of both halves of a step, and the milliseconds that they take as one large matrix product.

    `adapt` is a step on one crop; a step on `batch` crops has `batch` times as many products. A prediction runs in
    float32 (or tf32), whatever the precision of the gradient step.
    """
    tflop = {"adapt": batch * flops(adapt) / 1e12, "predict": flops(predict) / 1e12}
    rate = matmul_tflops(precision, device)
    plain = matmul_tflops("tf32", device) if precision == "bf16" else rate
    return {
        "adapt_tflop": tflop["adapt"],
        "predict_tflop": tflop["predict"],
        "matmul_tflops": rate,
        "floor_ms": 1e3 * (tflop["adapt"] / rate + tflop["predict"] / plain),
    }


def matmul_tflops(precision: str, device: torch.device) -> float:
    """TFLOP per second of a large square matrix product: the median of five after one to warm up."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    clock, found = Clock(device), []
    for _ in range(6):
        clock.start()
        a @ a
        clock.stop("product")()
        found.append(clock.read()["product"])
    return 2 * side**3 / 1e9 / statistics.median(found[1:])


def one_step(adapter: Any, frame: torch.Tensor, clock: Clock) -> dict[str, float]:
    """Adapt to a frame and predict it; milliseconds of the parts and of the whole, until the device has done it."""
    begun = time.perf_counter()
    handles = [
        adapter.branch.model.backbone.register_forward_pre_hook(clock.enter),
        adapter.branch.model.backbone.register_forward_hook(clock.stop("encoder")),
        adapter.branch.decoder.register_forward_hook(clock.stop("decoder")),
    ]
    adapter.adapt(frame)
    for handle in handles:
        handle.remove()
    clock.start()
    adapter.predict(frame)
    clock.stop("predict")()
    return clock.read() | {"step": 1e3 * (time.perf_counter() - begun)}


def peak_mib(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_own_process(options: argparse.Namespace, batch: int) -> dict[str, float] | str:
    """The measurement of one batch size (0: of plain inference), or why there is none."""
    size, frame = ([str(side) for side in pair] for pair in (options.size, options.frame))
    command = [sys.executable, __file__, "--only", str(batch), "--frames", str(options.frames), "--size", *size]
    command += ["--frame", *frame, "--device", options.device, "--precision", options.precision]
    command += [] if options.micro_batch is None else ["--micro-batch", str(options.micro_batch)]
    done = subprocess.run(command + ["--paper"] * options.paper, capture_output=True, text=True)
    if done.returncode:
        reason = "out of memory" if done.returncode == -9 or "emory" in done.stderr else done.stderr.strip()[-300:]
        return reason or f"exit status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"), help="of the gradient step"
    )
    parser.add_argument("--frame", type=int, nargs=2, metavar=("H", "W"), help="of the prediction; default: --size")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="run a batch's forward and backward N at a time")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="window 16, 32 crops of 512 x 1024, frames of 618 x 2048")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask2former_step.json")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.batches = options.batches or ([32] if options.paper else [1, 2, 4, 8, 16, 32])
    options.frame = options.frame or ([618, 2048] if options.paper else options.size)
    return options


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    set_precision(options.precision)
    if options.only is None:
        compare(options)
        return
    device = torch.device(options.device)
    found = measure(options, options.only, device) if options.only else measure_plain(options, device)
    print(json.dumps(found))


def compare(options: argparse.Namespace) -> None:
    """Measure all batch sizes and plain inference; a table to the screen, and a report to a file."""
    from ttt_adapt.evaluation.environment import environment

    plain = in_own_process(options, 0)
    told = ("size", "frame", "paper", "precision", "micro_batch", "device")
    settings = {name: getattr(options, name) for name in told}
    report: dict[str, Any] = {"environment": environment(), **settings, "plain": plain, "batches": {}}
    device = report["environment"]["cuda_device"] if options.device.startswith("cuda") else "CPU"
    print(f"{device}, {options.precision}, crops {tuple(options.size)}, frames {tuple(options.frame)}\n")
    columns = (*PARTS, "predict", "step", "floor_ms", "forward")
    print("| batch | " + " | ".join(f"{name.removesuffix('_ms')} ms" for name in columns), end="")
    print(" | step / forward | step / floor | TFLOP | peak MiB |")
    print("|---:|" + "---:|" * (len(columns) + 4))
    if isinstance(plain, str):
        print(f"| plain | {plain} |")
    else:
        blank = " |" * (len(columns) - 1)
        print(f"| plain |{blank} {plain['forward']:.0f} | | | | {plain['peak_mib']:.0f} |")
    for batch in options.batches:
        found = report["batches"][batch] = in_own_process(options, batch)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        if isinstance(found, str):
            print(f"| {batch} | {found} |")
            break  # larger batches need more memory
        cells = [f"{found[name]:.0f}" for name in columns]
        cells += [f"{found['step'] / found['forward']:.1f}", f"{found['step_over_floor']:.1f}"]
        cells += [f"{found['adapt_tflop'] + found['predict_tflop']:.2f}", f"{found['peak_mib']:.0f}"]
        print(f"| {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
