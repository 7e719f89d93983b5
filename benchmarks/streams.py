"""Many streams over one model, against as many adapters with a model each.

    python benchmarks/streams.py --out benchmarks/results/streams.json            # frames per second, memory, switching
    python benchmarks/streams.py --memory --out benchmarks/results/streams_memory.json    # what a stream holds

The streams take turns, frame by frame. `shared` is one adapter with `open_stream`, `apart` as many adapters, each on a
model of its own. `fps` counts the frames of all streams together, after one round of warm-up; `MiB` is the peak while
they are made and run. `switch ms` is the median time in which one stream's state takes the place of another's in the
model. With one CPU thread times are processor time.

`--memory` counts bytes: the weights that a stream adapts, the two moments of its optimizer, and its window.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timing import now, table, write
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.evaluation.peak_memory import PeakMemory

SIZE = (224, 224)
ENCODERS = {
    "resnet18": "layer4",
    "resnet50": "layer4",
    "convnext_tiny": "stages",
    "vit_tiny_patch16_224": "norm",
    "vit_small_patch16_224": "norm",
    "vit_base_patch16_224": "norm",
}
"""Name in timm -> where the encoder ends."""
PARTS = ("all", "last:2", "lora:4", "norms", "bias")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(name: str) -> tuple[nn.Module, MAEBranch]:
    torch.manual_seed(0)
    model = timm.create_model(name).to(DEVICE).eval()
    return model, MAEBranch.attach(model, ENCODERS[name])


def frames(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (*SIZE, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]


# ---- frames per second


def shared(name: str, config: StreamConfig, count: int) -> list[Any]:
    model, branch = made(name)
    adapter = StreamAdapter(model, branch, config=config)
    return [adapter.open_stream(f"cam-{i}") for i in range(count)]


def apart(name: str, config: StreamConfig, count: int) -> list[Any]:
    model, branch = made(name)
    branch.detach()
    found = []
    for _ in range(count):
        own = copy.deepcopy(model)
        found.append(StreamAdapter(own, MAEBranch.attach(own, ENCODERS[name]), config=config))
    return found


def speed(make: Callable[[], list[Any]], rounds: int) -> dict[str, float | None]:
    """Frames per second of all streams together, and the peak of memory."""
    with PeakMemory(DEVICE) as memory:
        streams, clip = make(), frames(rounds + 1)
        for stream in streams:
            stream.step(clip[0])
        started = now()
        for frame in clip[1:]:
            for stream in streams:
                stream.step(frame)
        seconds = now() - started
    return {"fps": rounds * len(streams) / seconds, "MiB": memory.mib}


def switch_ms(name: str, config: StreamConfig, turns: int = 20) -> float:
    """Median time in which a stream takes the place of another in the model."""
    model, branch = made(name)
    with StreamAdapter(model, branch, config=config) as adapter:
        states, times = [adapter.state, adapter.new_state()], []
        for state in states:
            adapter.swap(state)
            adapter.step(frames(1)[0])
        for turn in range(turns):
            started = now()
            adapter.swap(states[turn % 2])
            times.append((now() - started) * 1e3)
    return statistics.median(times[2:])


def speeds(names: list[str], parts: list[str], counts: list[int], rounds: int, batch: int) -> Iterator[dict[str, Any]]:
    for name in names:
        for part in parts:
            config = StreamConfig.online(adapt=part, batch_size=batch, norm_stats="frozen")
            switch = switch_ms(name, config)
            for count in counts:
                row: dict[str, Any] = {"model": name, "adapt": part, "streams": count, "switch ms": switch}
                for title, make in (("shared", shared), ("apart", apart)):
                    found = speed(partial(make, name, config, count), rounds)
                    row |= {f"{title} {key}": value for key, value in found.items()}
                yield row


# ---- what a stream holds


def held(names: list[str], parts: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        for part in parts:
            model, branch = made(name)
            with StreamAdapter(model, branch, config=StreamConfig.online(adapt=part, batch_size=1)) as adapter:
                stream = adapter.open_stream("cam")
                stream.step(frames(1)[0])
                state = stream.state_dict()
                window = (adapter.state.window.capacity + 1) * state["window"]["frames"][0].nbytes
            found = {"weights": size(state["weights"]), "optimizer": size(state["optimizer"]), "window": window}
            mib = {f"{key} MiB": value / 2**20 for key, value in found.items()}
            yield {"model": name, "adapt": part, **mib, "all MiB": sum(found.values()) / 2**20}


def size(value: Any) -> int:
    """Bytes of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.nbytes
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(size, inside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="what a stream holds, in place of speed")
    parser.add_argument("--models", nargs="+", choices=list(ENCODERS))
    parser.add_argument("--parts", nargs="+", default=None)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="this MAEBranch was never trained")  # speed and size are the same
    if options.memory:
        rows = held(options.models or list(ENCODERS), options.parts or list(PARTS))
    else:
        models, parts = options.models or ["resnet18", "vit_tiny_patch16_224"], options.parts or ["all", "norms"]
        rows = speeds(models, parts, options.streams, options.rounds, options.batch)
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        print(table([row], list(row)), flush=True)
    write(options.out, found)
    print("\n" + table(found, list(found[0])))


if __name__ == "__main__":
    main()
