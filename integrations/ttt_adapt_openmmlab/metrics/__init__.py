"""Scores of streams: mIoU, average precision and panoptic quality."""

from ttt_adapt_openmmlab.metrics.instances import StreamAPMetric
from ttt_adapt_openmmlab.metrics.panoptic import StreamPQMetric
from ttt_adapt_openmmlab.metrics.semantic import StreamIoUMetric

__all__ = ["StreamAPMetric", "StreamIoUMetric", "StreamPQMetric"]
