"""Which models of timm, transformers, torchvision and OpenMMLab the library takes as they are: one sweep each.

    OMP_NUM_THREADS=1 python benchmarks/breadth.py --timm           # also --transformers, --torchvision, --openmmlab
    OMP_NUM_THREADS=1 python benchmarks/breadth.py --timm --only levit_128s xcit_nano_12_p8_224   # shows what happens
    OMP_NUM_THREADS=1 python benchmarks/breadth.py --table          # docs/models.md, of the results as they are

Every model is built with random weights at a small size, without a download, and checked in a process of its own with
a limit of time (`sweeps/checks.py` has the checks; `sweeps/SWEEP_models.py` the list of models and its rule). Results
go into `results/breadth/SWEEP.json` after every model. A sweep that was stopped goes on where it was: models that have
a result of the same code and the same versions are not run again; `--failed` runs those that did not work as
suggested. `--only` runs the models that it names and saves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a forked process has one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

import torch

import ttt_adapt
from sweeps import report
from sweeps.checks import FAILS, NOT_BUILT, check_model, told
from ttt_adapt.evaluation.environment import environment

HERE = Path(__file__).parent
SWEEPS = {
    "timm": ("timm",),
    "transformers": ("transformers",),
    "torchvision": ("torchvision",),
    "openmmlab": ("mmsegmentation", "mmdet", "mmengine"),
}
"""Sweep -> packages whose versions its results depend on."""
PARTS = ("model", "objectives", "stream", "engine", "calibration")
"""Folders of the library that a result depends on, beside the modules at its top."""
LIMIT = 90.0
"""Seconds of the processor that a model may take. Of the clock it may take 20 times as many and a minute: others may
use the processor too, and a process that waits for ever uses none."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in (name for name in SWEEPS if getattr(options, name)):
        sweep = import_module(f"sweeps.{name}_models")
        sweep.prepare()
        if options.only:
            _show(sweep, options)
        else:
            run_sweep(name, sweep, options)
    if options.table or not options.only:
        options.page.write_text(report.page(options.out))


def run_sweep(name: str, sweep: Any, options: argparse.Namespace) -> None:
    """Run what the results lack, and save after every model."""
    file = options.out / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text())["models"] if file.exists() else {}
    state, made = code_state(name), environment()
    listed = sweep.names()
    results = {model: results[model] for model in listed if model in results}
    wanted = [model for model in listed if _is_due(results.get(model), state, options.failed)][: options.limit]
    for number, model in enumerate(wanted, 1):
        results[model] = {**in_child(sweep, model, options.seconds), "group": sweep.group(model), "state": state}
        ordered = {model: results[model] for model in listed if model in results}
        content = {"environment": made, "listed": len(listed), "models": ordered}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(file)
        print(f"{number}/{len(wanted)} {_line(model, results[model])}", flush=True)
    counts = Counter(result["status"] for result in results.values())
    print(f"{name}: {', '.join(f'{count} {status}' for status, count in counts.most_common())}", flush=True)


def _is_due(result: dict[str, Any] | None, state: str, only_failed: bool) -> bool:
    """Whether a model has to run: it has no result, or one of another code, or one that is asked for again."""
    if result is None:
        return True
    return result["status"] != report.AS_SUGGESTED if only_failed else result["state"] != state


def _show(sweep: Any, options: argparse.Namespace) -> None:
    """Run the models that are named, and print all that is found."""
    for model in options.only:
        result = in_child(sweep, model, options.seconds)
        print(_line(model, result))
        print(json.dumps(result, indent=2), flush=True)


def _line(model: str, result: dict[str, Any]) -> str:
    reason = f": {result['reason'][:200]}" if "reason" in result else ""
    return f"{model}: {result['status']}, {result.get('encoder', '')} {result['seconds']:.1f} s{reason}"


def in_child(sweep: Any, model: str, limit: float) -> dict[str, Any]:
    """The result of one model, of a forked process that has what this one imported.

    Args:
        sweep: its module.
        model: name in the sweep.
        limit: seconds of the processor, after which the process is killed.
    """
    started = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(sweep, model, limit, send), daemon=True)
    child.start()
    send.close()
    try:
        found = (
            receive.recv()
            if receive.poll(60 + 20 * limit)
            else {"status": FAILS, "reason": "no result for a long time"}
        )
    except EOFError:
        child.join()
        late = child.exitcode == -signal.SIGXCPU
        why = f"no result after {limit:.0f} s" if late else f"the process ended with status {child.exitcode}"
        found = {"status": FAILS, "reason": why}
    child.kill()
    child.join()
    return {"seconds": limit, **found, "clock_seconds": round(time.perf_counter() - started, 1)}


def _child(sweep: Any, model: str, limit: float, send: Any) -> None:
    """Look at one model and send the result; what it prints is lost."""
    resource.setrlimit(resource.RLIMIT_CPU, (max(round(limit), 1), resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        found = looked_at(sweep, model)
    except BaseException as error:  # also SystemExit: whatever happens is the result of this model
        found = {"status": FAILS, "reason": told(error)}
    send.send({**found, "seconds": round(time.process_time(), 1)})
    send.close()


def looked_at(sweep: Any, model: str) -> dict[str, Any]:
    """The result of one model: of the sweep's own checks, or of those that all models have in common."""
    if hasattr(sweep, "check"):
        return sweep.check(model)
    try:
        subject = sweep.build(model)
    except Exception as error:
        return {"status": NOT_BUILT, "reason": told(error)}
    return check_model(subject)


def code_state(name: str) -> str:
    """A digest of the code and the versions that the results of a sweep depend on."""
    library = Path(ttt_adapt.__file__).parent
    files = [*library.glob("*.py"), *(file for part in PARTS for file in (library / part).rglob("*.py"))]
    files += [HERE / "sweeps" / f"{stem}.py" for stem in ("checks", "subject", f"{name}_models")]
    if name == "openmmlab":
        files += Path(import_module("ttt_adapt_openmmlab").__file__ or "").parent.rglob("*.py")
    digest = hashlib.sha256(" ".join(f"{p} {version(p)}" for p in ("torch", *SWEEPS[name])).encode())
    for content in sorted(file.read_bytes() for file in files):
        digest.update(content)
    return digest.hexdigest()[:12]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SWEEPS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="run these, print all that is found, save nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N models")
    parser.add_argument("--failed", action="store_true", help="run again what did not work as suggested")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="that a model may take; default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "breadth", help="folder of the results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "models.md", help="the table's document")
    parser.add_argument("--table", action="store_true", help="write the page only")
    options = parser.parse_args(arguments)
    if not options.table and not any(getattr(options, name) for name in SWEEPS):
        parser.error(f"name a sweep: {', '.join(f'--{name}' for name in SWEEPS)}; or --table")
    return options


if __name__ == "__main__":
    sys.exit(main())
