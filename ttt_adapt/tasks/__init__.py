"""Tasks: what a model's output means, and how it is trained, scored and drawn.

Training, evaluation and `run` are the same for every task: they ask the task that the checkpoint names.
"""

from ttt_adapt.tasks.base import Criterion, Metric, Score, Stills, Task, check_output
from ttt_adapt.tasks.colorization.task import Colorization
from ttt_adapt.tasks.lookup import TASKS, find_task, task_of
from ttt_adapt.tasks.segmentation.task import Segmentation

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
