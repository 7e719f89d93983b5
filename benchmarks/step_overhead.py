"""What `adapter.step` costs beyond the arithmetic: against other loops, a hand-written one and the plain forward.

    python benchmarks/step_overhead.py                 # against a loop written by hand
    python benchmarks/step_overhead.py --torch-ttt     # against torch-ttt's rotation engine, ResNet-18 and ResNet-50

The hand-written loop uses no hooks and none of the adapter: it runs the model's own modules one after the other, with
the same masks, loss and optimizer (restarted at every frame, or carried on), and a plain list as window. torch-ttt
(pip install -e ".[bench]") is the other library of online adaptation on the package index: its `TTTEngine` runs
with its own defaults, with and without the copy of the model that it makes per call, on the same network and the same
frames, one at a time. All loops are interleaved frame by frame and medians are reported, of processor time with
OMP_NUM_THREADS=1. `--memory` measures peak memory of the process instead, each loop in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timing import Step, interleaved, write
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.model.features import Features
from ttt_adapt.objectives import Rotation
from ttt_adapt.objectives.decoders import Pyramid
from ttt_adapt.objectives.masking import random_mask, upsample_mask

SIZE = (128, 160)


class SmallCNN(nn.Module):
    """Four stages of strided convolutions with BatchNorm, and a pyramid head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 192)
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=4 if n == 0 else 2, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(),
                nn.Conv2d(o, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for n, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.backbone = Stages(self.stages)
        self.head = Pyramid(widths, 11, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Stages(nn.Module):
    def __init__(self, stages: nn.ModuleList) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def make(kind: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    if kind == "cnn":
        return SmallCNN().eval(), "backbone"
    return timm.create_model("vit_tiny_patch16_224", img_size=SIZE).eval(), "norm"


def masked_mse(prediction: Tensor, images: Tensor, mask: Tensor, patch: int) -> Tensor:
    hidden = ~upsample_mask(mask, patch)
    return ((prediction - images).square().mean(1, keepdim=True) * hidden).sum() / hidden.sum()


def cnn_loss(model: Any, branch: MAEBranch, images: Tensor, mask: Tensor) -> Tensor:
    """The masked pass of the CNN, written out."""
    visible = upsample_mask(mask, 16).to(images.dtype)
    first = model.stages[0]
    channel = branch.mask_channel
    x = first[0](images * visible) + F.conv2d(1 - visible, channel.weight, None, channel.stride, channel.padding)
    maps = []
    for n, stage in enumerate(model.stages):
        x = stage[1:](x) if n == 0 else stage(x)
        maps.append(x)
    return masked_mse(branch.decoder(Features(maps, maps, SIZE)), images, mask, 16)


def vit_loss(model: Any, branch: MAEBranch, images: Tensor, mask: Tensor) -> Tensor:
    """The masked pass of the ViT, written out: gather the visible tokens, run the blocks, put them back."""
    x = model._pos_embed(model.patch_embed(images))
    b, n, c = x.shape
    kept = int(mask[0].sum())
    order = mask.flatten(1).byte().argsort(dim=1, descending=True, stable=True)[:, :kept] + 1
    index = torch.cat([order.new_zeros(b, 1), order], 1)[..., None].expand(-1, -1, c)
    x = model.blocks(model.norm_pre(x.gather(1, index)))
    x = model.norm(branch.mask_token.expand(b, n, c).scatter(1, index, x))
    grid = (SIZE[0] // 16, SIZE[1] // 16)
    maps = [x[:, 1:].transpose(1, 2).unflatten(2, grid)]
    return masked_mse(branch.decoder(Features(maps, x, SIZE)), images, mask, 16)


class HandWritten:
    """Online TTT-MAE in twenty lines, for this model only."""

    def __init__(self, kind: str, batch: int, window: int, restart: bool = True) -> None:
        self.model, encoder = make(kind)
        self.branch = MAEBranch.attach(self.model, encoder).eval()  # its weights only; the pass is written out
        self.loss: Callable[..., Tensor] = cnn_loss if kind == "cnn" else vit_loss
        self.parameters = [*self.branch.encoder_parameters().values(), *self.branch.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)
        self.frames: list[Tensor] = []
        self.batch, self.window, self.restart = batch, window, restart

    def step(self, frame: Tensor) -> Tensor:
        self.frames = [*self.frames[-self.window + 1 :], frame]
        draws = torch.randint(len(self.frames), (self.batch,)).tolist()
        images = torch.stack([self.frames[i] for i in draws])
        mask = random_mask(self.batch, (SIZE[0] // 16, SIZE[1] // 16), 0.8)
        if self.restart:
            self.optimizer.state.clear()
        self.loss(self.model, self.branch, images, mask).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            return self.model(frame[None])


def make_adapter(kind: str, batch: int, window: int, restart: bool = True) -> StreamAdapter:
    model, encoder = make(kind)
    config = StreamConfig(
        window=window, batch_size=batch, lr=1e-5, encoder_lr_scale=1.0, weight_decay=0.0, source_pull=0.0,
        restart_optimizer=restart,
    )  # fmt: skip
    return StreamAdapter(model, encoder=encoder, config=config)


def check_losses(kind: str) -> None:
    """The written-out pass must be the branch's, or the comparison means nothing."""
    hand = HandWritten(kind, 2, 2)
    images = torch.randn(2, 3, *SIZE)
    mask = hand.branch.draw_mask(images)
    ours = hand.branch.reconstruct(images, mask=mask).loss
    torch.testing.assert_close(hand.loss(hand.model, hand.branch, images, mask).detach(), ours, rtol=1e-5, atol=1e-6)


def torch_ttt(depth: int, copy: bool) -> Step:
    """torch-ttt's rotation engine, its head built as its training would have built it."""
    from torch_ttt.engine.ttt_engine import TTTEngine

    options = {} if copy else {"copy_model": False}
    engine = TTTEngine(resnet(depth), "global_pool", optimization_parameters=options)
    engine.train()(torch.randn(1, 3, *SIZE))
    engine.eval()
    return lambda frame: engine(frame[None])[0]


def resnet(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f"resnet{depth}", num_classes=10).eval()


def resnet_adapter(depth: int, **changes: Any) -> Step:
    config = StreamConfig(window=16, lr=1e-5, restart_optimizer=True).replace(**changes)
    return StreamAdapter(resnet(depth), encoder="layer4", config=config).step


def rotation_adapter(depth: int) -> Step:
    """The arithmetic of torch-ttt's defaults: three steps on four turned images, and a prediction."""
    model = resnet(depth)
    config = StreamConfig(window=1, batch_size=4, iterations=3, lr=1e-5)
    return StreamAdapter(model, Rotation.attach(model, "layer4"), config=config).step


def plain_forward(model: nn.Module) -> Step:
    def forward(frame: Tensor) -> Tensor:
        with torch.no_grad():
            return model(frame[None])

    return forward


AGAINST_TORCH_TTT: dict[str, Callable[[int], Step]] = {
    "adapter_1": lambda depth: resnet_adapter(depth, batch_size=1),
    "adapter_8": lambda depth: resnet_adapter(depth, batch_size=8),
    "adapter_rotation": rotation_adapter,
    "torch_ttt": lambda depth: torch_ttt(depth, copy=True),
    "torch_ttt_no_copy": lambda depth: torch_ttt(depth, copy=False),
    "forward": lambda depth: plain_forward(resnet(depth)),
}


def time_one(kind: str, batch: int, restart: bool, frames: int, window: int) -> dict[str, float]:
    steps: dict[str, Step] = {
        "adapter": make_adapter(kind, batch, window, restart).step,
        "hand": HandWritten(kind, batch, window, restart).step,
        "forward": plain_forward(make(kind)[0]),
    }
    ms = interleaved(steps, torch.randn(frames, 3, *SIZE))
    return {**ms, "to_hand": ms["adapter"] / ms["hand"], "to_forward": ms["adapter"] / ms["forward"]}


def time_against_torch_ttt(depth: int, frames: int) -> dict[str, float]:
    ms = interleaved({name: make(depth) for name, make in AGAINST_TORCH_TTT.items()}, torch.randn(frames, 3, *SIZE))
    ratios = {f"{name}_to_forward": value / ms["forward"] for name, value in ms.items() if name != "forward"}
    return {**ms, **ratios, "torch_ttt_to_adapter_1": ms["torch_ttt"] / ms["adapter_1"]}


def peak_memory(loop: str, kind: str, batch: int, restart: bool, window: int, frames: int) -> float:
    """Peak resident memory of this process in MiB after `frames` steps."""
    if kind.startswith("resnet"):
        step = AGAINST_TORCH_TTT[loop](int(kind.removeprefix("resnet")))
    else:
        step = (make_adapter if loop == "adapter" else HandWritten)(kind, batch, window, restart).step
    for _ in range(frames):
        step(torch.randn(3, *SIZE))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--torch-ttt", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("LOOP", "MODEL", "BATCH", "OPTIMIZER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        loop, kind, batch, optimizer = options.one
        print(peak_memory(loop, kind, int(batch), optimizer == "restarted", options.window, options.frames))
        return
    rows: list[dict[str, Any]] = []
    for row in _torch_ttt_rows(options) if options.torch_ttt else _rows(options):
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write(options.out, rows)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for kind in ("cnn", "vit"):
        check_losses(kind)
        for batch, optimizer in itertools.product((1, 8), ("restarted", "carried")):
            if options.memory:
                found = _memory(kind, batch, optimizer, options)
            else:
                found = time_one(kind, batch, optimizer == "restarted", options.frames, options.window)
            yield {"model": kind, "batch": batch, "optimizer": optimizer, "frames": options.frames} | found


def _torch_ttt_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for depth in (18, 50):
        if options.memory:
            yield {"model": f"resnet{depth}"} | _peaks(AGAINST_TORCH_TTT, [f"resnet{depth}", "0", "-"], 5, options)
        else:
            times = time_against_torch_ttt(depth, options.frames)
            yield {"model": f"resnet{depth}", "frames": options.frames} | times


def _peaks(loops: Iterable[str], what: list[str], frames: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak MiB of each loop, in a process of its own; `what` is the rest of `--one`."""
    command = [sys.executable, __file__, "--frames", str(frames), "--window", str(options.window), "--one"]
    done = {loop: subprocess.run([*command, loop, *what], capture_output=True, text=True, check=True) for loop in loops}
    return {loop: float(process.stdout) for loop, process in done.items()}


def _memory(kind: str, batch: int, optimizer: str, options: argparse.Namespace) -> dict[str, float]:
    found = _peaks(("adapter", "hand"), [kind, str(batch), optimizer], 30, options)
    model, encoder = make(kind)
    branch = MAEBranch.attach(model, encoder)
    adapted = [*branch.encoder_parameters().values(), *branch.parameters()]
    weights = sum(p.numel() * p.element_size() for p in adapted) / 2**20
    window = options.window * 3 * SIZE[0] * SIZE[1] * 4 / 2**20
    return {**found, "adapted_weights": weights, "window": window}


if __name__ == "__main__":
    main()
