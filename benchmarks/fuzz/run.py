"""Damaged files and states by the thousand: errors of the library only, nothing taken in part, no process that ends.

    python benchmarks/fuzz/run.py states --count 10000
    python benchmarks/fuzz/run.py checkpoints --count 10000 --seed 1

Each trial has a seed of its own. Trials run in a child process; when it ends, that trial is a crash, and another child
goes on behind it. The outcomes are counted, and faults are shown with the seed that repeats them
(`--seed SEED --count 1`).
"""

from __future__ import annotations

import argparse
import json
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
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, and for the child

KINDS = ("states", "checkpoints", "calibrations", "training", "reports")
MEMORY = 8 * 2**30
"""Bytes of address space of a child: a file that asks for more has to be refused before."""
SECONDS = 60
"""What a trial may take."""


def fuzzer(kind: str) -> Any:
    """What makes trials of this kind."""
    if kind == "states":
        from fuzz.states import States

        return States()
    from fuzz import files

    return getattr(files, kind.capitalize())()


def child(kind: str, seeds: range) -> None:
    """Run trials and print one line of JSON for each: its seed, its outcome, and where it is a fault."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    made = fuzzer(kind)
    for seed in seeds:
        signal.alarm(SECONDS)
        try:
            outcome, fault = made.trial(random.Random(seed)), ""
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"fault: {type(error).__name__}"
            fault = f"{' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"
            made = fuzzer(kind)
        signal.alarm(0)
        print(json.dumps([seed, outcome, fault]), flush=True)


def _too_long(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def trials(kind: str, count: int, seed: int = 0) -> Iterator[tuple[int, str, str]]:
    """Seed, outcome and fault of every trial, each in a child process."""
    following, end = seed, seed + count
    while following < end:
        command = [sys.executable, __file__, kind, "--count", str(end - following), "--seed", str(following), "--child"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
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


def main() -> int:
    """The command line; 1 if there are faults."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kind", choices=KINDS)
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        child(given.kind, range(given.seed, given.seed + given.count))
        return 0
    outcomes: Counter[str] = Counter()
    with suppress(KeyboardInterrupt):  # the counts so far are shown
        for seed, outcome, fault in trials(given.kind, given.count, given.seed):
            outcomes[outcome] += 1
            if fault or outcome.startswith("crash"):
                print(f"seed {seed}: {outcome}: {fault}", flush=True)
    for outcome, count in outcomes.most_common():
        print(f"{count:6d} {outcome}")
    return int(any(outcome.startswith(("fault", "crash")) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
