"""Colorization: from grey pictures, or film, to colour."""

from ttt_adapt.tasks.colorization.task import Colorization

__all__ = ["Colorization"]
