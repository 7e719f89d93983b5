"""What grows when streams run for long: memory, threads, open files, hooks on the model, live tensors.

    OMP_NUM_THREADS=1 nice python benchmarks/soak.py --out benchmarks/results/soak.json    # 20,000, and 8 x 2,000
    OMP_NUM_THREADS=1 nice python benchmarks/soak.py --frames 1000                         # and 8 x 100

`one` is one stream of `--frames` frames; `many` are 8 streams over one model (`open_stream`), a tenth as many frames
each, in turns. Both go through all that a long run meets: each 250th frame a stream is saved and loaded again, each
900th a frame of a wrong shape comes and is refused, and each 2,500th the stream begins anew. `parked` is `many` with
three streams on the device, the others in files.

The first tenth of the frames is warm-up; `growth` compares what is there at the end with what was there behind it. The
model is a small one without training: what grows with the number of frames does not depend on its size. The exit status
is 1 where memory grows by 1 % or more, or anything else by one or more.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timing import table, write
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.sharing.video import OneVideo

SIZE = (32, 48)
STREAMS = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {"MiB": 0.01, "threads": 0, "files": 0, "hooks": 0, "tensors": 0}
"""What may grow: memory by a share, all else by a number."""


class Small(nn.Module):
    """A segmentation model with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        self.backbone, self.head = nn.Sequential(*layers), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, 4, H / 8, W / 8] of images [B, 3, H, W]."""
        scores: Tensor = self.head(self.backbone(x))
        return scores


def frames(seed: int) -> Iterator[Tensor]:
    """Frames without end, uint8 [H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(256, (*SIZE, 3), dtype=torch.uint8, generator=generator)


def preprocess(frame: Tensor) -> Tensor:
    """A frame as the model takes it."""
    return frame.to(DEVICE).permute(2, 0, 1)[None].float() / 127.5 - 1


def there(model: nn.Module) -> dict[str, float]:
    """What is there now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    status = Path("/proc/self/status").read_text()
    hooks = sum(
        len(found) for module in model.modules() for name, found in vars(module).items() if name.endswith("_hooks")
    )
    found = {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "threads": int(status.partition("Threads:")[2].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "hooks": hooks,
        "tensors": sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
    }
    return found | ({"GPU MiB": torch.cuda.memory_allocated() / 2**20} if DEVICE.type == "cuda" else {})


def live_on(stream: OneVideo, index: int, frame: Tensor, folder: Path) -> None:
    """One frame of a stream, and what else happens to streams now and then."""
    stream.step(frame)
    if index % 250 == 249:
        stream.save(folder / "state.safetensors")
        stream.load(folder / "state.safetensors")
    if index % 900 == 899:
        try:
            stream.step(frame[..., 0])
        except TTTAdaptError:
            pass
        else:
            raise AssertionError("a frame without colours was taken")
    if index % 2500 == 2499:
        stream.reset()


def soak(name: str, adapter: StreamAdapter, streams: Sequence[OneVideo], count: int, folder: Path) -> dict[str, Any]:
    """Run `count` frames through each stream, in turns, and measure 21 times, first after a tenth."""
    model, begun, seen = adapter.branch.model, time.perf_counter(), []
    moments = {round(count * (0.1 + 0.9 * i / 20)) for i in range(21)}
    sources = [islice(frames(seed), count) for seed in range(len(streams))]
    for index, row in enumerate(zip(*sources, strict=True)):
        for stream, frame in zip(streams, row, strict=True):
            live_on(stream, index, frame, folder)
        if index + 1 in moments:
            seen.append({"frame": index + 1, **there(model)})
            rate = (index + 1) * len(streams) / (time.perf_counter() - begun)
            print(f"{name}: frame {index + 1} of {count}, {rate:.0f} a second, {seen[-1]['MiB']:.1f} MiB", flush=True)
    first, last = seen[0], seen[-1]
    growth = {each: last[each] - first[each] for each in first if each != "frame"}
    growth["MiB"] /= first["MiB"]
    return {"run": name, "streams": len(streams), "frames": count, "growth": growth, "measured": seen}


def adapter_for(**more: Any) -> StreamAdapter:
    """An adapter on a new model."""
    torch.manual_seed(0)
    model = Small().to(DEVICE).eval()
    branch = MAEBranch.attach(model, "backbone", patch_size=16)
    config = StreamConfig.online(window=4, batch_size=2, lr=1e-4)
    return StreamAdapter(model, branch, config=config, preprocess=preprocess, **more)


def main() -> int:
    """Soak, and write what grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with adapter_for() as adapter:
            rows.append(soak("one", adapter, [adapter], options.frames, folder))
        for run, more in (("many", {}), ("parked", {"resident": 3, "park": folder})):
            with adapter_for(**more) as adapter:
                streams = [adapter.open_stream(f"cam-{number}") for number in range(STREAMS)]
                rows.append(soak(run, adapter, streams, max(options.frames // 10, 20), folder))
    shown = [{**row, **{f"+ {name}": value for name, value in row["growth"].items()}} for row in rows]
    print(table(shown, ["run", "streams", "frames", *(f"+ {name}" for name in LIMITS)]))
    write(options.out, rows)
    grown = [f"{row['run']}: {name}" for row in rows for name, limit in LIMITS.items() if row["growth"][name] > limit]
    print("grew: " + (", ".join(grown) or "nothing"))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
