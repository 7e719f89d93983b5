"""Damaged files and states by the thousand: errors of the library only, nothing taken in part, no process that ends.

    python benchmarks/fuzz/run.py states --count 10000
    python benchmarks/fuzz/run.py checkpoints training --count 10000 --seed 1
    python benchmarks/fuzz/run.py all --out benchmarks/results/fuzz.json

Each trial has a seed of its own. Trials run in a child process; when it ends, that trial is a crash, and another child
goes on behind it. The outcomes are counted, and faults are shown with the seed that repeats them
(`--seed SEED --count 1`). A trial may take a gibibyte of memory more than was taken before the first one, and ten
seconds of a processor. `--out` keeps the counts of each kind, and where they were made.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, and for the child

KINDS = ("states", "checkpoints", "calibrations", "training", "reports")
MEMORY = 2**30
"""Bytes of address space that a trial may take: a file that asks for more has to be refused before."""
SECONDS = 10
"""Seconds of a processor that a trial may take."""
WAITING = 120
"""Seconds of a clock that it may take; twice as many where it never comes back to Python."""


def fuzzer(kind: str) -> Any:
    """What makes trials of this kind."""
    if kind == "states":
        from fuzz.states import States

        return States()
    from fuzz import files

    return getattr(files, kind.capitalize())()


def child(kind: str, seeds: range) -> None:
    """Run trials and print one line of JSON for each: its seed, its outcome, and where it is a fault."""
    for each in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(each, _too_long)
    made = fuzzer(kind)
    limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in seeds:
        signal.alarm(WAITING)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(2 * WAITING, exit=True)
        try:
            outcome, fault = made.trial(random.Random(seed)), ""
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"fault: {type(error).__name__}"
            fault = f"{' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"
            made = fuzzer(kind)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([seed, outcome, fault]), flush=True)


def _too_long(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s of a processor, or {WAITING} s")


def trials(kind: str, count: int, seed: int = 0) -> Iterator[tuple[int, str, str]]:
    """Seed, outcome and fault of every trial, each in a child process."""
    following, end = seed, seed + count
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # each further thread would take address space of the trial
    while following < end:
        command = [sys.executable, __file__, kind, "--count", str(end - following), "--seed", str(following), "--child"]
        with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=alone) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            began = following
            for line in running.stdout:
                if line.startswith("["):
                    number, outcome, fault = json.loads(line)
                    yield number, outcome, fault
                    following = number + 1
            told = running.stderr.read()
        if following < end:
            if following == began and running.returncode > 0:
                raise RuntimeError(f"the fuzzer itself fails: {told[-2000:]}")
            yield following, f"crash: the process ended with {running.returncode}", told[-200:]
            following += 1


def run(kind: str, count: int, seed: int) -> Counter[str]:
    """The outcomes of this many trials; those so far, after Ctrl-C. Faults are shown as they come."""
    outcomes: Counter[str] = Counter()
    with suppress(KeyboardInterrupt):
        for number, outcome, fault in trials(kind, count, seed):
            outcomes[outcome] += 1
            if fault or outcome.startswith("crash"):
                print(f"seed {number}: {outcome}: {fault}", flush=True)
    for outcome, times in outcomes.most_common():
        print(f"{times:6d} {outcome}", flush=True)
    return outcomes


def write(out: Path, kind: str, seed: int, outcomes: Counter[str]) -> None:
    """Put the counts of a kind into a JSON file, in the place of those that it has of this kind."""
    from ttt_adapt.evaluation.environment import environment

    kept = json.loads(out.read_text()) if out.exists() else {}
    kept[kind] = {
        "count": outcomes.total(),
        "seed": seed,
        "outcomes": dict(outcomes.most_common()),
        "environment": environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({kind: kept[kind] for kind in KINDS if kind in kept}, indent=1) + "\n")


def main() -> int:
    """The command line; 1 if there are faults."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kinds", nargs="+", choices=("all", *KINDS))
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="JSON file for the counts")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    kinds = KINDS if "all" in given.kinds else tuple(given.kinds)
    if given.child:
        child(kinds[0], range(given.seed, given.seed + given.count))
        return 0
    faults = 0
    for kind in kinds:
        if len(kinds) > 1:
            print(f"{kind}:", flush=True)
        outcomes = run(kind, given.count, given.seed)
        faults += sum(outcome.startswith(("fault", "crash")) for outcome in outcomes)
        if given.out is not None:
            write(given.out, kind, given.seed, outcomes)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
