"""The eager engine: forward and backward as PyTorch runs them. The other engines change one part of it each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.precision import both_passes, forward_pass
from ttt_adapt.errors import EncoderError, MemoryLimitError
from ttt_adapt.objectives.base import Objective


@dataclass(frozen=True)
class Problem:
    """What a gradient step differentiates.

    Attributes:
        objective: whose loss.
        parameters: by what; one that the loss does not reach gets no gradient.
        encoder: how many of them, from the first, are the encoder's.
        generator: the stream's random source.
        config: the stream's settings.
        device: where it runs.
    """

    objective: Objective
    parameters: list[nn.Parameter]
    encoder: int
    generator: torch.Generator
    config: StreamConfig
    device: torch.device


Gradients = tuple[Tensor | None, ...]


class EagerEngine:
    """Runs everything as it is called.

    Args:
        reason: why this engine was picked, for people.
    """

    name = "eager"
    records = False  # whether `run` may repeat a call without running its Python again

    def __init__(self, reason: str = "asked for") -> None:
        self.reason = reason

    def run(self, what: str, call: Callable[..., Any], *inputs: Tensor, key: Hashable = ()) -> Any:
        """`call(*inputs)`.

        Args:
            what: a name for the call.
            call: returns tensors, nested in lists, tuples and dicts.
            inputs: tensors that differ from frame to frame.
            key: all else that the result depends on and that Python decides.
        """
        return call(*inputs)

    def gradients(self, problem: Problem, batch: Tensor) -> Tensor:
        """Leave the gradients of the loss of `batch` [B, 3, H, W] in `.grad` of the parameters, and no others.

        Returns:
            The loss, detached.

        Raises:
            EncoderError: the loss reaches no parameter of the encoder.
        """
        parts = batch.split(problem.config.micro_batch or len(batch))
        with both_passes(problem.config.precision):
            value, found = self.one_pass(problem, parts[0])
            if len(parts) > 1:
                value, found = self._sum(problem, parts, value, found)
        for parameter, gradient in zip(problem.parameters, found, strict=True):
            parameter.grad = gradient
        if all(gradient is None for gradient in found[: problem.encoder]):
            raise EncoderError(
                "the loss reaches none of the encoder's parameters: they were replaced after the branch was attached "
                "(by load_state_dict(assign=True), for example); attach again"
            )
        return value

    def _sum(
        self, problem: Problem, parts: tuple[Tensor, ...], value: Tensor, found: Gradients
    ) -> tuple[Tensor, Gradients]:
        """The weighted mean of loss and gradients over all parts; those of the first are given."""
        total = sum(len(part) for part in parts)
        value = value * (len(parts[0]) / total)
        reached = [g for g in found if g is not None]
        torch._foreach_mul_(reached, len(parts[0]) / total)
        for part in parts[1:]:
            more, others = self.one_pass(problem, part)
            value = value + more * (len(part) / total)
            torch._foreach_add_(reached, [g for g in others if g is not None], alpha=len(part) / total)
        return value, found

    def one_pass(self, problem: Problem, images: Tensor) -> tuple[Tensor, Gradients]:
        """Loss and gradients of images that go through the model at once."""
        with torch.enable_grad():
            with forward_pass(problem.config.precision, problem.device):
                value = problem.objective.loss(images, generator=problem.generator)
            found = torch.autograd.grad(value, problem.parameters, allow_unused=True)
        return value.detach(), found

    def predict(self, predict: Callable[[Tensor], Any], x: Tensor) -> Any:
        """`predict(x)`."""
        return predict(x)

    def forget(self) -> None:
        """Drop everything that holds on to the stream's tensors; it is made again when it is needed."""


@contextmanager
def explained_memory_errors(config: StreamConfig) -> Iterator[None]:
    """Turn out-of-memory errors inside the block into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not known or isinstance(error, MemoryLimitError):
            raise
        raise MemoryLimitError(
            f"out of memory in a step with batch_size={config.batch_size}, crop_size={config.crop_size}, "
            f"window={config.window}: set micro_batch, or lower batch_size or crop_size first, then window, or use "
            "precision='bf16'"
        ) from error
