"""What a task is: all that training, evaluation and `run` ask about outputs, labels, scores and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ttt_adapt.data.augment import Augment
from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.data.drift import Drift, DriftedClip, Schedule
from ttt_adapt.errors import FrameError, FrameTypeError
from ttt_adapt.tasks.spec import ModelSpec

Criterion = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Metric:
    """A number that a run has as a result, and how it is shown.

    Attributes:
        field: its name in `Run.scores`.
        title: its name in tables and plots.
        unit: stands in brackets behind the title; "" for none.
        step: unit of a difference of two such numbers.
        scale: factor from the number that is kept to the number that is shown.
        digits: how many are shown behind the decimal point.
        higher_is_better: whether a higher number is better.
        change: what stands in brackets behind a value: its "percent" change relative to the reference, its
            "difference" to it, or "" for nothing.
        floor: the name in `Run.scores` of what the input itself scores, where bars begin; "" for zero.
        note: what stands below a table that shows it; "" for nothing.
    """

    field: str
    title: str
    unit: str = ""
    step: str = ""
    scale: float = 1.0
    digits: int = 2
    higher_is_better: bool = True
    change: str = "difference"
    floor: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, mean: float, spread: float | None = None) -> str:
        """The number as it is shown, with its standard deviation if one is given."""
        shown = f"{self.scale * mean:.{self.digits}f}"
        return shown if spread is None else f"{shown} ± {self.scale * spread:.{self.digits}f}"

    def signed(self, difference: float) -> str:
        """A difference of two such numbers as it is shown."""
        return f"{self.scale * difference:+.{self.digits}f}"

    def better(self, value: float) -> float:
        """The number, with its sign changed where lower is better: larger is always better."""
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Stills:
    """Opened training data.

    Attributes:
        samples: clips, or pairs (uint8 RGB [H, W, 3], uint8 labels [H, W]).
        size: (H, W) of every sample.
        classes: class names; () where the labels mean nothing.
        palette: one colour per class; () for the default colours.
        notes: what the user should know about the data, one sentence each.
    """

    samples: Sequence[Clip] | Sequence[Sample]
    size: tuple[int, int]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    notes: tuple[str, ...] = ()


class Score(Protocol):
    """Collects the scores of one clip, frame by frame."""

    def update(self, prediction: Any, label: Any) -> float:
        """Add a frame. Returns the task's main metric of this frame, NaN where it has none."""
        ...

    def per_frame(self) -> np.ndarray:
        """The main metric of every frame so far, NaN where a frame has none."""
        ...

    def result(self) -> Mapping[str, Any]:
        """The scores over the clip: "frames", their number; the numbers by their `Metric.field` and any others.

        A task with classes also gives "per_class", a score by class name, None for a class that is not there.

        Raises:
            DataError: there is nothing to score.
        """
        ...


class Task(ABC):
    """A task of a checkpoint.

    Attributes:
        name: as on the command line.
        metrics: what its score gives, in the order of table columns. The first is the main metric over the whole clip,
            the second the mean over frames of what `Score.per_frame` holds.
        class_metric: the metric of the scores per class (`per_class` of a result), for tasks whose results have them.
        about: what the metrics mean, for the caption of a table.
        augment: the random changes to a training sample.
        outputs: what the model returns, in words.
        distribution: whether the output's channels are class scores, whose softmax is a distribution.
        keeps_classes: whether a prediction needs only the most likely class of every pixel.
        labelled: whether the targets are class ids that come with the frames.
        source: caption of the picture that the model is shown.
        weight_files: names of the files with networks that some metrics need.
        palette: colours of the classes, uint8 RGB [n, 3]; None for a task without classes.
    """

    name: str
    metrics: tuple[Metric, ...]
    class_metric: Metric = Metric("per_class", "score")
    about: str
    augment: Augment
    outputs: str
    distribution: bool
    keeps_classes: bool
    labelled: bool
    source: str
    weight_files: tuple[str, ...] = ()
    palette: np.ndarray | None = None

    @property
    @abstractmethod
    def channels(self) -> int:
        """How many channels the model's output has."""

    @classmethod
    @abstractmethod
    def of(cls, spec: ModelSpec) -> Task:
        """The task of a checkpoint with this description.

        Raises:
            ConfigError: the description has an option that the task does not know.
        """

    @classmethod
    @abstractmethod
    def stills(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None
    ) -> Stills:
        """The training data under the folder `data`; errors say what is missing."""

    @classmethod
    @abstractmethod
    def clips(
        cls, data: str, names: Sequence[str], size: tuple[int, int] | None, classes: Sequence[str] | None, format: str
    ) -> list[Clip]:
        """Clips to evaluate on: pairs of the frame that the model is shown, uint8 RGB [H, W, 3], and its label."""

    @classmethod
    @abstractmethod
    def adopt(cls, clip: Clip) -> Clip:
        """A clip of frames and class ids, made into a clip of this task."""

    @classmethod
    def drifted(cls, clip: Clip, drift: Drift | Schedule) -> Clip:
        """A clip of this task as the model sees it under a drift; labels that come with the frames stay."""
        return DriftedClip(clip, drift)

    @classmethod  # noqa: B027 - most tasks take every clip
    def check_clip(cls, clip: Clip) -> None:
        """Refuse a clip that cannot be scored, before the first run. Looks at a few frames.

        Raises:
            DataError: the clip cannot be scored; the message says why.
        """

    @abstractmethod
    def sample(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of an augmented sample: what the model is shown, [3, H, W] in [0, 1], and the target of the criterion."""

    @abstractmethod
    def criterion(self, samples: Any) -> Criterion:
        """The loss of the task, (model output, targets) -> scalar; `samples` is the data set to train on."""

    @abstractmethod
    def see(self, frame: np.ndarray) -> np.ndarray:
        """What the model is shown of a video's frame, uint8 RGB [H, W, 3]; same type and shape."""

    @abstractmethod
    def predict(self, output: Tensor, frame: np.ndarray) -> np.ndarray:
        """The prediction that a model's output stands for, at the size of the frame."""

    @abstractmethod
    def draw(self, frame: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """A prediction as a picture, uint8 RGB [H, W, 3]."""

    @abstractmethod
    def score(self, ignore: int = 255, weights: Path | None = None) -> Score:
        """An empty score.

        Args:
            ignore: label id of void.
            weights: folder with the networks that some metrics need; None leaves these metrics out.
        """


def check_output(output: Any, frame: np.ndarray, task: Task, what: str) -> Tensor:
    """Check that `output` is what a model of this task returns for a frame of this size, and return it.

    Raises:
        FrameTypeError, FrameError: it is not; the message says what came and what was expected.
    """
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise FrameTypeError(f"{what} returned a {kind}; expected {task.outputs}, a tensor [1, C, H, W]")
    expected = [1, task.channels, *frame.shape[:2]]
    if [*output.shape] != expected:
        raise FrameError(
            f"{what} returned {[*output.shape]}; expected {task.outputs} {expected}, of the frame's own size "
            "(resize them in the model or in `predict`)"
        )
    return output
