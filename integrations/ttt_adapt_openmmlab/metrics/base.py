"""The base of the metrics of streams: scores over the data set, over frames and over videos.

Every arm is scored by the same function, and every score comes in three readings:

- `NAME`: all frames together, as mmsegmentation, mmdetection and COCO score a data set;
- `NAME_frames`: the mean of the scores of single frames, over the frames that have one;
- `NAME_videos`: the mean of the videos' scores, each weighted by its number of frames.

With several videos there are `VIDEO/NAME` and `VIDEO/NAME_frames` too. All scores are percent, not rounded; a score
without anything to score is NaN. Frames may come in any order and from any rank: scores do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.frame_order import file_of, frame_key, video_of

Scores = dict[str, float]


class StreamMetric(BaseMetric):
    """The base: keeps one value per frame, and scores data set, frames and videos by one function.

    Args:
        averaged: which scores get the readings over frames and videos.
        collect_device: "cpu" or "gpu", as MMEngine takes it.
        prefix: put before the names of the scores.
    """

    default_prefix = "stream"

    def __init__(self, averaged: Sequence[str], collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.averaged = averaged

    def measure(self, sample: dict) -> Any:
        """What the score needs to know of one frame: small, and able to travel between processes."""
        raise NotImplementedError

    def score(self, values: Sequence[Any]) -> Scores:
        """The scores of these frames together, in percent."""
        raise NotImplementedError

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Measures the frames of a batch.

        Raises:
            DataError: a sample lacks ground truth or predictions, or they do not fit each other.
        """
        for sample in data_samples:
            place = {"video": video_of(sample), "key": frame_key(sample), "file": file_of(sample)}
            self.results.append({**place, "value": self.measure(sample)})

    def compute_metrics(self, results: list) -> Scores:
        """All readings of all scores, from the frames of all ranks."""
        videos = _by_video(results)
        if not videos:
            raise DataError("no frame was scored; expected a test loop over at least one")
        single = {name: [self.score([value]) for value in video] for name, video in videos.items()}
        whole = {name: self.score(video) for name, video in videos.items()}
        lengths = [len(video) for video in videos.values()]
        together = [value for video in videos.values() for value in video]
        scores = self.score(together) if len(videos) > 1 else dict(whole[next(iter(videos))])
        for name in self.averaged:
            scores[f"{name}_frames"] = mean([frame[name] for video in single.values() for frame in video])
            scores[f"{name}_videos"] = mean([video[name] for video in whole.values()], lengths)
        if len(videos) > 1:
            for video, label in _labels(videos).items():
                for name in self.averaged:
                    scores[f"{label}/{name}"] = whole[video][name]
                    scores[f"{label}/{name}_frames"] = mean([frame[name] for frame in single[video]])
        headline = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if "/" not in name)
        MMLogger.get_current_instance().info(f"{sum(lengths)} frames of {len(videos)} videos, percent: {headline}")
        return scores

    def class_count(self) -> int:
        """How many classes the data set has."""
        return len(self._meta("classes"))

    def _meta(self, key: str) -> Sequence[str]:
        meta = self.dataset_meta or {}
        if key not in meta:
            raise ConfigError(f"{type(self).__name__} needs {key!r} in the metainfo of the test data set; it has none")
        return meta[key]


def _by_video(results: Sequence[dict]) -> dict[str, list[Any]]:
    """The values of every video in order, each frame once: samplers may repeat frames to give ranks equal lengths."""
    once = {(result["video"], result["key"], result["file"]): result["value"] for result in results}
    videos: dict[str, list[Any]] = {}
    for place in sorted(once):
        videos.setdefault(place[0], []).append(once[place])
    return videos


def _labels(videos: Mapping[str, Any]) -> dict[str, str]:
    """A short name for every video: the last part of its path where that is enough."""
    short = {video: Path(video).name or video for video in videos}
    return short if len(set(short.values())) == len(short) else {video: video for video in videos}


def mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | None = None) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    numbers = np.asarray(values, float)
    defined = ~np.isnan(numbers)
    if not defined.any():
        return float("nan")
    return float(np.average(numbers[defined], weights=None if weights is None else np.asarray(weights)[defined]))


def size_text(image: Any) -> str:
    """The size of an array or tensor, as messages write it."""
    return " x ".join(map(str, image.shape))
