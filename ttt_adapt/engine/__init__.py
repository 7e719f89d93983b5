"""How a gradient step runs."""

from ttt_adapt.engine.eager import gradients

__all__ = ["gradients"]
