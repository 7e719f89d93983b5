"""Runs of `ttt-adapt run --state` that are killed (SIGKILL) at random moments, and go on with --resume.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --moments 50 --out benchmarks/results/kill.json

One run is never killed. Others are killed again and again, each a random time after a random frame, until they come to
their end; then their label maps, raw outputs, film and last state are compared with those of the first one, byte for
byte and bit for bit. Each process is forked from one that has loaded the library, so that the moments fall into the
work and not into the loading of modules. The video is a film of the rendered street, the model a small one without
training; half of the runs see the video as a folder of pictures.

The exit status is 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av  # noqa: F401 - here, so that no process has to load it
import rich.progress  # noqa: F401
import timm  # noqa: F401
import torch
from PIL import Image

from timing import write
from ttt_adapt.config import StreamConfig
from ttt_adapt.data.street import StreetClip
from ttt_adapt.evaluation.adapt_video import adapt_video
from ttt_adapt.evaluation.run_state import RunState
from ttt_adapt.tasks.checkpoint import Checkpoint, build_model, save_checkpoint
from ttt_adapt.tasks.spec import ModelSpec
from ttt_adapt.video import VideoWriter

SIZE = (64, 96)
CONFIG = StreamConfig.online(window=3, batch_size=2, lr=1e-3)
SOURCES = ("street.mp4", "frames")
TARGETS = {"out": "film.mp4", "labels_out": "labels", "raw_out": "raw"}


def make_inputs(folder: Path, frames: int) -> None:
    """A checkpoint, and a street as a film and as a folder of pictures."""
    torch.manual_seed(0)
    cnn = {"channels": [8, 16, 24, 32]}
    spec = ModelSpec("resnet18", ("road", "car", "sky"), SIZE, cnn, {}, width=16)
    model, branch = build_model(spec)
    save_checkpoint(folder / "model.safetensors", Checkpoint(model.eval(), branch, spec))
    (folder / "frames").mkdir()
    with VideoWriter(folder / "street.mp4", 10) as film:
        for index, (frame, _) in enumerate(StreetClip(seed=0, frames=frames, size=SIZE)):
            film.write(frame)
            Image.fromarray(frame).save(folder / "frames" / f"{index}.png")


def run(inputs: Path, source: str, out: Path, every: int) -> None:
    """One process of a run, which goes on where there is a state."""
    targets: dict[str, Any] = {name: out / file for name, file in TARGETS.items()}
    adapt_video(
        str(inputs / source), inputs / "model.safetensors", **targets, size="native", config=CONFIG,
        state=out / "state.safetensors", state_every=every, resume=True,
    )  # fmt: skip


def forked(work: Callable[[], None], log: Path) -> int:
    """The id of a process that does the work, writes what it says into `log`, and ends with status 0 on success."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(work: Callable[[], None], log: Path, moment: Callable[[], bool] | None = None) -> bool:
    """Do work in a process of its own, and kill it when `moment` says so. Returns whether it came to its end by itself.

    Raises:
        RuntimeError: it ended with an error.
    """
    child = forked(work, log)
    done, status = os.waitpid(child, 0 if moment is None else os.WNOHANG)
    while not done:
        if moment is not None and moment():
            os.kill(child, signal.SIGKILL)
            moment = None
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        print(log.read_text(), file=sys.stderr)
        raise RuntimeError("a process ended with an error, which stands above")
    return True


def random_moment(out: Path, frames: int, seconds: float, dice: random.Random) -> Callable[[], bool]:
    """Tells when it is time: up to `seconds` after a random frame was written, from those that are not there yet."""
    labels, begun = out / TARGETS["labels_out"], time.perf_counter()
    done = max(frames_of(out), 0)
    wanted, wait = dice.randint(done, frames), dice.uniform(0, seconds)
    reached: list[float] = [begun] if wanted == done else []

    def moment() -> bool:
        if not reached and labels.is_dir() and len(list(labels.glob("*.png"))) >= wanted:
            reached.append(time.perf_counter())
        return bool(reached) and time.perf_counter() - reached[0] >= wait

    return moment


def contents(out: Path) -> dict[str, Any]:
    """What a run left: the bytes of all files but those that tell times, and its last state in plain values."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    files = {name: content for name, content in files.items() if not name.endswith(("run.json", "state.safetensors"))}
    state = RunState.read(out / "state.safetensors")
    return {**files, "frames": state.frames, "trace": state.trace, "stream": _plain(state.runner)}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def frames_of(out: Path) -> int:
    """How many frames the state of a run has; -1 before its first state."""
    file = out / "state.safetensors"
    return RunState.read(file).frames if file.exists() else -1


def killed_until_done(
    work: Callable[[], None], out: Path, frames: int, seconds: float, dice: random.Random, left: int
) -> list[int]:
    """Kill a run at up to `left` random moments, and let it come to its end; returns the frames of its states then."""
    states: list[int] = []
    while True:
        moment = random_moment(out, frames, seconds, dice) if len(states) < left else None
        if ended(work, out.with_suffix(".log"), moment):
            return states
        states.append(frames_of(out))


def main() -> int:
    """Kill, go on, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--every", type=int, default=7, help="frames between two states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dice, different, states, runs = random.Random(options.seed), list[str](), list[int](), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ended(lambda: make_inputs(root, options.frames), root / "inputs.log")
        expected, seconds = {}, {}
        for source in SOURCES:
            out, begun = root / f"whole {source[:3]}", time.perf_counter()
            out.mkdir()
            ended(partial(run, root, source, out, options.every), out.with_suffix(".log"))
            seconds[source], expected[source] = time.perf_counter() - begun, contents(out)
        while len(states) < options.moments:
            source, out = SOURCES[runs % 2], root / f"killed {runs}"
            out.mkdir()
            frame, left = 2 * seconds[source] / options.frames, options.moments - len(states)
            work = partial(run, root, source, out, options.every)
            states += killed_until_done(work, out, options.frames, frame, dice, left)
            found, runs = contents(out), runs + 1
            names = sorted({*expected[source], *found})
            different += [f"run {runs}: {name}" for name in names if found.get(name) != expected[source].get(name)]
            print(f"{len(states)} moments, {runs} runs, {len(different)} differences", flush=True)
    row = {"moments": len(states), "runs": runs, "frames": options.frames, "every": options.every, "seed": options.seed}
    write(options.out, [{**row, "frames of the states at the moments": states, "different": different}])
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
