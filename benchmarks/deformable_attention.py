"""Multi-scale deformable attention: mmcv's function in plain PyTorch against ours and against other ways to write it.

    python benchmarks/deformable_attention.py --out benchmarks/results/deformable_attention.json

The shapes are those of Mask2Former's pixel decoder, where every pixel of three levels is a query. The implementations
are called in turn. The table shows medians over the rounds (small shapes get ten times as many), as ratios to mmcv's.
On one CPU thread (`OMP_NUM_THREADS=1`) the clock is that of the process, so that other processes disturb it less. On a
GPU the time is taken between CUDA events, and mmcv's compiled operator is measured, too, if there is one. First, every
implementation is compared with mmcv's function in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ttt_adapt_openmmlab  # noqa: F401  # before mmcv.ops, which may lack its operators
from ttt_adapt.evaluation.environment import environment
from ttt_adapt_openmmlab.ops.deformable import deformable_attention

from mmcv.ops import multi_scale_deform_attn as mmcv_attention  # isort: skip

MMCV = getattr(
    mmcv_attention.multi_scale_deformable_attn_pytorch,
    "__wrapped__",
    mmcv_attention.multi_scale_deformable_attn_pytorch,
)
SWIN_S, MINI = (8, 32), (4, 16)
CASES = {  # crop, images, (heads, channels per head)
    "Swin-S 256 x 512": ((256, 512), 1, SWIN_S),
    "mini 96 x 128": ((96, 128), 1, MINI),
    "mini 96 x 128, batch 8": ((96, 128), 8, MINI),
    "Swin-S 256 x 512, batch 4": ((256, 512), 4, SWIN_S),
}
GPU_CASES = {
    "Swin-S 512 x 1024, batch 4": ((512, 1024), 4, SWIN_S),
    "Swin-S 512 x 1024, batch 8": ((512, 1024), 8, SWIN_S),
}
POINTS = 4


def inputs(crop: tuple[int, int], images: int, head: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Values, level sizes, locations some pixels around each query, and weights."""
    generator = torch.Generator().manual_seed(0)
    levels = [(crop[0] // stride, crop[1] // stride) for stride in (32, 16, 8)]
    shapes = torch.tensor(levels)
    queries = int(shapes.prod(1).sum())
    centres = torch.cat(
        [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in levels]
    )
    place = (images, queries, head[0], len(levels), POINTS)
    offsets = 3 * torch.randn(*place, 2, generator=generator) / shapes.flip(1)[:, None]
    value = torch.randn(images, queries, *head, generator=generator)
    weights = torch.randn(*place[:3], len(levels) * POINTS, generator=generator).softmax(-1).view(place)
    floats = [value, centres[None, :, None, None, None] + offsets, weights]
    value, locations, weights = (t.to(device, dtype) for t in floats)
    return [value, shapes.to(device), locations, weights]


def grid_sample_added(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """`grid_sample` per level as in mmcv, added up level by level, without a stack of all samples."""
    batch, _, heads, dim = value.shape
    queries, total, at = locations.shape[1], None, 0
    for level, (h, w) in enumerate(shapes.tolist()):
        maps = value[:, at : at + h * w].permute(0, 2, 3, 1).reshape(batch * heads, dim, h, w)
        at += h * w
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (sampled * weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, -1)).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.view(batch, heads * dim, queries).transpose(1, 2).contiguous()


def corners(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the flat values [B S heads, dim] that every query's head sums, and their weights: [B Q heads, 4 L P]."""
    batch, tokens, heads, _ = value.shape
    sizes = shapes.flip(-1)[:, None]
    starts = (shapes.prod(1).cumsum(0) - shapes.prod(1))[:, None]
    pixel = locations * sizes - 0.5
    low = pixel.detach().floor()
    rest, low = pixel - low, low.long()
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1, 1) * tokens
    head = torch.arange(heads, device=value.device).view(-1, 1, 1)
    rows, shares = [], []
    for down in (0, 1):
        for across in (0, 1):
            x, y = low[..., 0] + across, low[..., 1] + down
            inside = (x >= 0) & (x < sizes[..., 0]) & (y >= 0) & (y < sizes[..., 1])
            rows.append(((image + starts + y * sizes[..., 0] + x) * heads + head) * inside)
            share = (rest[..., 0] if across else 1 - rest[..., 0]) * (rest[..., 1] if down else 1 - rest[..., 1])
            shares.append(share * weights * inside)
    return torch.stack(rows, -1).flatten(3).flatten(0, 2), torch.stack(shares, -1).flatten(3).flatten(0, 2)


def one_gather(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """All corners gathered at once, and one batched matrix product."""
    rows, shares = corners(value, shapes, locations, weights)
    read = value.reshape(-1, value.shape[3]).index_select(0, rows.flatten()).view(*rows.shape, -1)
    return torch.bmm(shares[:, None], read).view(*locations.shape[:2], -1)


def plain_bags(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """`embedding_bag` over all corners, differentiated by PyTorch."""
    rows, shares = corners(value, shapes, locations, weights)
    table = value.reshape(-1, value.shape[3])
    return F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum").view(*locations.shape[:2], -1)


def compiled_mmcv(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return mmcv_attention.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


def implementations(device: str) -> dict[str, Callable[..., Tensor]]:
    found = {
        "mmcv": MMCV,
        "ours": deformable_attention,
        "grid_sample, added": grid_sample_added,
        "one gather": one_gather,
        "embedding_bag": plain_bags,
    }
    compiled = importlib.util.find_spec("mmcv._ext")
    if device == "cuda" and compiled is not None and compiled.origin:
        found["mmcv, compiled"] = compiled_mmcv
    return found


def run(attention: Callable[..., Tensor], arguments: list[Tensor], backward: bool) -> list[Tensor]:
    """The result, and with `backward` the gradients of its sum of squares."""
    if not backward:
        with torch.inference_mode():
            return [attention(*arguments)]
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in arguments]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [leaves[0], *leaves[2:]])]


def errors(found: dict[str, Callable[..., Tensor]], case: tuple, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest difference from mmcv in float64, of result and gradients, each relative to its largest value."""
    arguments = inputs(*case, dtype, device)
    exact = run(MMCV, [t.double() if t.is_floating_point() else t for t in arguments], True)
    return {
        name: max(
            float((a.double() - b).abs().max() / b.abs().max())
            for a, b in zip(run(attention, arguments, True), exact, strict=True)
        )
        for name, attention in found.items()
    }


def seconds(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begun = clock()
        call()
        return clock() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(
    found: dict[str, Callable[..., Tensor]], arguments: list[Tensor], backward: bool, rounds: int, device: str
) -> dict[str, float]:
    """Milliseconds of each implementation; they are called in turn, in another order in each round."""
    times: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            taken = seconds(lambda name=name: run(found[name], arguments, backward), device)
            if index:  # the first warms up
                times[name].append(1e3 * taken)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.precision]
    found = implementations(options.device)
    where = environment()
    named = where["cuda_device"] if options.device == "cuda" else f"CPU, {where['torch_threads']} thread"
    report: dict[str, Any] = {"environment": where, "device": named, "precision": options.precision, "rows": []}
    print(f"{named}, {options.precision}; ratios of time to mmcv's\n\n| shape | pass | {' | '.join(found)} |")
    print("|---|---|" + "---:|" * len(found))
    for name, case in (CASES | (GPU_CASES if options.device == "cuda" else {})).items():
        wrong = errors(found, case, dtype, options.device)
        arguments = inputs(*case, dtype, options.device)
        for backward in (False, True):
            rounds = options.rounds * (10 if name.startswith("mini") else 1)
            ms = medians(found, arguments, backward, rounds, options.device)
            ratio = {key: value / ms["mmcv"] for key, value in ms.items()}
            passes = "forward and backward" if backward else "forward"
            report["rows"].append({"shape": name, "pass": passes, "ms": ms, "ratio": ratio, "error": wrong})
            print(f"| {name} | {passes} | " + " | ".join(f"{value:.2f}" for value in ratio.values()) + " |", flush=True)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
