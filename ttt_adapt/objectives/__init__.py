"""Label-free objectives that a stream can be adapted with."""

from ttt_adapt.objectives.base import Objective

__all__ = ["Objective"]
