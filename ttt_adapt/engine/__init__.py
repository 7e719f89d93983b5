"""How a gradient step runs."""

from ttt_adapt.engine.eager import explained_memory_errors, gradients

__all__ = ["explained_memory_errors", "gradients"]
