"""Tasks: what a model's output means, how it is trained, scored and drawn.

Training, evaluation and `run` are the same for all of them and ask the task of the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.tasks.base import Criterion, Metric, Score, Stills, Task, check_output
from ttt_adapt.tasks.colorization import Colorization
from ttt_adapt.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from ttt_adapt.tasks.checkpoint import ModelSpec

__all__ = [
    "TASKS",
    "Colorization",
    "Criterion",
    "Metric",
    "Score",
    "Segmentation",
    "Stills",
    "Task",
    "check_output",
    "find_task",
    "task_of",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Segmentation, Colorization)}
"""Every task by name."""


def find_task(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message holds the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]


def task_of(spec: ModelSpec) -> Task:
    """The task of a checkpoint.

    Raises:
        ConfigError: an unknown task, or options that it does not know.
    """
    return find_task(spec.task).of(spec)
