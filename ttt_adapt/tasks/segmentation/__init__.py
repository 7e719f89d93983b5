"""Semantic segmentation: a class for every pixel, and how that is scored."""

from ttt_adapt.tasks.segmentation.score import SegmentationScore
from ttt_adapt.tasks.segmentation.task import Segmentation

__all__ = ["Segmentation", "SegmentationScore"]
