"""Tasks by name, as they stand on the command line and in checkpoints."""

from __future__ import annotations

from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.tasks.base import Task
from ttt_adapt.tasks.colorization.task import Colorization
from ttt_adapt.tasks.segmentation.task import Segmentation
from ttt_adapt.tasks.spec import ModelSpec

TASKS: dict[str, type[Task]] = {task.name: task for task in (Segmentation, Colorization)}
"""Every task, by name."""


def find_task(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]


def task_of(spec: ModelSpec) -> Task:
    """The task of a checkpoint.

    Raises:
        ConfigError: the task is unknown, or does not know an option.
    """
    return find_task(spec.task).of(spec)
