"""What memory layout and grad mode are worth: channels-last for the gradient, `inference_mode` for the prediction.

    python benchmarks/layouts.py --out benchmarks/results/layouts.json

Ratios below 1 are gains. `images_last` gives the images of the gradient step in channels-last, `all_last` also the
weights (`model.to(memory_format=torch.channels_last)`), both against the layout that PyTorch starts with;
`inference_mode` is a prediction under it against one under `no_grad`, as the adapter predicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timing import Step, device_name, interleaved, table, write
from ttt_adapt import MAEBranch

MODELS = {"resnet18": "layer4", "convnext_atto": "stages", "vit_tiny_patch16_224": "norm"}
SIZE = (128, 160)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    sized = {"img_size": SIZE} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **sized).eval()


def gradient(name: str, images: torch.memory_format, weights: torch.memory_format) -> Step:
    model = build(name)
    branch = MAEBranch.attach(model, MODELS[name]).eval()
    model.to(memory_format=weights)
    branch.to(memory_format=weights)
    parameters = [*branch.encoder_parameters().values(), *branch.parameters()]

    def step(batch: Tensor) -> None:
        torch.autograd.grad(branch.loss(batch.to(memory_format=images)), parameters, allow_unused=True)

    return step


def prediction(name: str, mode: Callable[[], Any]) -> Step:
    model = build(name)

    def predict(batch: Tensor) -> Any:
        with mode():
            return model(batch)

    return predict


def measure(name: str, batch: int, frames: int) -> dict[str, Any]:
    plain, last = torch.contiguous_format, torch.channels_last
    steps = {
        "plain": gradient(name, plain, plain),
        "images_last": gradient(name, last, plain),
        "all_last": gradient(name, last, last),
    }
    if batch == 1:  # a prediction is of one frame
        steps |= {mode.__name__: prediction(name, mode) for mode in (torch.no_grad, torch.inference_mode)}
    ms = interleaved(steps, torch.randn(frames, batch, 3, *SIZE))
    ratios = {key: ms[key] / ms["plain"] for key in ("images_last", "all_last")}
    if batch == 1:
        ratios["inference_mode"] = ms["inference_mode"] / ms["no_grad"]
    return {"model": name, "batch": batch, **ratios, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        for batch in (1, 8):
            rows.append(measure(name, batch, options.frames))
            write(options.out, rows)
    print(f"{device_name()}\n\n{table(rows, ['model', 'batch', 'images_last', 'all_last', 'inference_mode'])}")


if __name__ == "__main__":
    main()
