"""The results of an evaluation: one `Run` per arm, clip and seed, all in a `Report`.

A report is saved after every run, so an interrupted evaluation goes on where it stopped (`Report.has`). A task says
which scores its runs have and how they are shown (`ttt_adapt.tasks`): mIoU is a fraction in [0, 1] in the data and
percent in the tables, PSNR dB in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.errors import ConfigError, DataError, StateError
from ttt_adapt.file_kind import refuse_other_kind
from ttt_adapt.files import atomic_write, read_small
from ttt_adapt.schema import check_fields, dict_of, flag, list_of, number, optional, plain, read_json, text, whole
from ttt_adapt.tasks import Metric, Score, Task, find_task

FORMAT = 2
"""Version of the JSON layout. Format 1 had the scores of every task as fields of a run; it is still read."""


@dataclass
class Run:
    """One arm on one clip with one seed.

    Attributes:
        arm: name of the arm.
        clip: name of the clip.
        seed: the seed it ran with.
        per_frame: the task's headline metric of every frame; None where a frame has none, such as one that is all void.
        losses: label-free loss at every frame; None where the arm did not adapt, or the loss was not finite.
        ms_per_frame: mean time of a step, in milliseconds, without the first one, which warms up.
        task: whose scores it has.
        scores: over the clip, by the names that the task's metrics have as `Metric.field`; None, or no entry, where a
            score was not measured. What each is: the score of the task (`ttt_adapt.tasks`).
        per_class: a score of every class by its name; None for classes that the clip never shows; empty for tasks
            without classes.
        fps: labelled frames per second of the clip; None where unknown.
        peak_memory_mib: peak memory above what was held at the start (see `peak_memory`); None if unknown.
        forwards: under real-time scoring, the forward passes per frame that the arm was charged; None without.
        streaming: whether the arm predicted each frame before it saw a later one.
        oracle: whether it chose by the labels.
    """

    arm: str
    clip: str
    seed: int
    per_frame: list[float | None]
    losses: list[float | None]
    ms_per_frame: float
    task: str = "segmentation"
    scores: dict[str, float | None] = field(default_factory=dict)
    per_class: dict[str, float | None] = field(default_factory=dict)
    fps: float | None = None
    peak_memory_mib: float | None = None
    forwards: float | None = None
    streaming: bool = True
    oracle: bool = False

    @classmethod
    def from_score(
        cls,
        arm: str,
        clip: str,
        seed: int,
        score: Score,
        losses: Sequence[float | None],
        ms: Sequence[float],
        task: str = "segmentation",
    ) -> Run:
        """A run from its collected score, and for every frame the loss (None = none) and milliseconds (NaN = none).

        Raises:
            DataError: `losses` or `ms` has not one value per frame, or there is nothing to score.
        """
        scores = dict(score.result())
        frames, per_class = scores.pop("frames"), scores.pop("per_class", {})
        for name, values in (("losses", losses), ("ms", ms)):
            if len(values) != frames:
                raise DataError(f"{name} has {len(values)} values for {frames} frames; expected one a frame")
        return cls(
            arm=arm,
            clip=clip,
            seed=seed,
            per_frame=[_finite(value) for value in score.per_frame()],
            losses=[_finite(value) for value in losses],
            ms_per_frame=_mean_time(ms),
            task=task,
            scores=scores,
            per_class=per_class,
        )

    def value(self, metric: Metric) -> float | None:
        """A score of this run; None where it has none of that name."""
        return self.scores.get(metric.field)


@dataclass
class Report:
    """All runs of one evaluation.

    Attributes:
        config: the settings it ran with; anything JSON can hold.
        environment: where it ran; see `ttt_adapt.evaluation.environment.environment`.
        runs: in the order they were made.
        failures: runs that failed, with arm, clip, seed and error, and clips that cannot be scored, with clip and
            error; they are tried again by the next call.
    """

    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def has(self, arm: str, clip: str, seed: int) -> bool:
        """Whether this run was made already."""
        return any((run.arm, run.clip, run.seed) == (arm, clip, seed) for run in self.runs)

    def add(self, run: Run) -> None:
        """Adds a run.

        Raises:
            StateError: the same arm, clip and seed is there already.
        """
        if self.has(run.arm, run.clip, run.seed):
            raise StateError(f"arm {run.arm!r} on clip {run.clip!r} with seed {run.seed} is in the report already")
        self.runs.append(run)

    def select(self, arm: str | None = None, clip: str | None = None) -> list[Run]:
        """The runs of one arm, one clip, or both."""
        return [run for run in self.runs if arm in (None, run.arm) and clip in (None, run.clip)]

    def marked(self, arm: str) -> str:
        """The arm's name as it is shown; see `marked`."""
        return marked(arm, self.select(arm))

    @property
    def task(self) -> type[Task]:
        """The task of the runs, whose metrics they have; segmentation without runs.

        Raises:
            DataError: a task that this version does not know.
        """
        try:
            return find_task(self.runs[0].task if self.runs else "segmentation")
        except ConfigError as error:
            raise DataError(f"the report is of a task that is not known here: {error}") from error

    @property
    def headline(self) -> Metric:
        """The metric that arms are compared by."""
        return self.task.metrics[0]

    @property
    def arms(self) -> list[str]:
        """Arm names in the order they first ran."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def reference(self) -> str | None:
        """The arm that others are compared with: the first that was asked for, of those that ran; None without runs."""
        return next((label for label in [*self.config.get("rows", ()), *self.arms] if label in self.arms), None)

    @property
    def clips(self) -> list[str]:
        """Clip names in the order they first ran."""
        return list(dict.fromkeys(run.clip for run in self.runs))

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        write_json(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing, or not such a report.
        """
        refuse_other_kind(path, ("report", "json", "text"), "not an evaluation report", DataError)
        data = read_json(read_small(path, DataError), str(path), DataError)
        what = f"{path} is not an evaluation report: it"
        check_fields(data, {"format": whole(1)}, what, others=True, error=DataError)
        if data["format"] > FORMAT:
            raise DataError(
                f"{path} has format {data['format']}, and this version of ttt_adapt reads formats up to {FORMAT}: "
                "update ttt_adapt"
            )
        check_fields(data, _FIELDS, what, required=("config", "environment", "runs"), others=True, error=DataError)
        if data["format"] == 1:
            _upgrade(data)
        for run in data["runs"]:
            check_fields(run, _RUN, f"{what} has a run that", required=_NEEDED, others=True, error=DataError)
        check_fields(
            data["config"], {"rows": _rows}, f"{what} has a config that", required=(), others=True, error=DataError
        )
        for failure in data.get("failures", ()):
            check_fields(failure, _FAILURE, f"{what} has a failure that", others=True, error=DataError)
        names = {entry.name for entry in fields(Run)}
        runs = [Run(**{key: value for key, value in run.items() if key in names}) for run in data["runs"]]
        return cls(data["config"], data["environment"], runs, list(data.get("failures", [])))


def _rows(value: Any) -> str:
    """Label of a row -> what describes it; the hashes of calibrations are read again."""
    digests = list_of(optional(text))
    return dict_of(dict_of(plain))(value) or dict_of(lambda row: digests(row.get("calibrations", ())))(value)


_MEASURED = optional(number())
_SCORES = dict_of(_MEASURED)
_FIELDS = {
    "config": dict_of(plain),
    "environment": dict_of(plain),
    "runs": list_of(dict_of(plain)),
    "failures": list_of(dict_of(plain)),
}
"""What the file of a report holds."""
_FAILURE = {"arm": optional(text), "clip": text, "seed": optional(whole()), "error": text}
"""What a failure in it holds."""
_RUN = {
    "arm": text,
    "clip": text,
    "seed": whole(),
    "per_frame": list_of(_MEASURED),
    "losses": list_of(_MEASURED),
    "ms_per_frame": number(0.0),
    "task": text,
    "scores": _SCORES,
    "per_class": _SCORES,
    "fps": _MEASURED,
    "peak_memory_mib": _MEASURED,
    "forwards": _MEASURED,
    "streaming": flag,
    "oracle": flag,
}
"""What a run in it holds."""
_NEEDED = [entry.name for entry in fields(Run) if entry.default is MISSING and entry.default_factory is MISSING]


def _upgrade(data: dict[str, Any]) -> None:
    """Turn the JSON of format 1 into that of format 2, in place.

    In format 1 the scores of all tasks are fields of a run, those of other tasks None, and the rows of an evaluation
    are called "contenders".
    """
    if "contenders" in data["config"]:
        data["config"]["rows"] = data["config"].pop("contenders")
    known = {entry.name for entry in fields(Run)}
    for run in data["runs"]:
        former = {name: run.pop(name) for name in [*run] if name not in known}
        run["scores"] = {name: score for name, score in former.items() if score is not None}


def marked(arm: str, runs: Iterable[Run]) -> str:
    """The name of an arm, with † where it saw the whole clip first, and ‡ where it also chose by the labels."""
    runs = list(runs)
    return arm + (" ‡" if any(run.oracle for run in runs) else "" if all(run.streaming for run in runs) else " †")


def write_json(path: str | Path, report: Report) -> None:
    """Writes the report as JSON. If writing fails, the old file stays.

    Raises:
        DataError: `config` or `environment` holds something that is no JSON.
    """
    path = Path(path)
    try:
        text = json.dumps({"format": FORMAT, **asdict(report)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the report cannot be written as JSON: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _mean_time(ms: Sequence[float]) -> float:
    """The mean of the times after the first frame; the time of the first frame where there are no others."""
    later = [value for value in ms[1:] if not math.isnan(value)]
    return float(np.mean(later or ms[:1]))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
