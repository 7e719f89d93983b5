"""The eager engine: forward and backward as PyTorch runs them. The other engines change one part of it each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.engine.precision import both_passes, forward_pass
from ttt_adapt.engine.recompute import recomputing
from ttt_adapt.errors import EncoderError, MemoryLimitError
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.model.outside_changes import REPLACED
from ttt_adapt.objectives.base import SplitLoss
from ttt_adapt.stream.optimizer import StreamOptimizer, decides_on_device, laid_out_alike, step_if
from ttt_adapt.stream.state import StreamState

Gradients = tuple[Tensor | None, ...]


class EagerEngine:
    """Runs everything as it is called.

    Attributes:
        memory: what the predicted model, which may hold the model of the branch, keeps of the video; None where nobody
            looks after it.

    Args:
        step: what is differentiated.
        reason: why this engine was picked, for people.
    """

    name = "eager"
    written_down = False  # whether a pass is written down once, and repeated without the model's Python
    recorded = False  # whether it is written down while it runs, in a recording of the device

    def __init__(self, step: GradientStep, reason: str = "asked for") -> None:
        self.gradient_step, self.reason = step, reason
        self.memory: ModelMemory | None = None

    def note(self, remark: str) -> None:
        """Add a remark to the reason, once."""
        if remark not in self.reason:
            self.reason += f"; {remark}"

    def check(self) -> None:
        """Look at the model before a step.

        Raises:
            EncoderError: the model's weights were replaced by other tensors.
            ConfigError: a pass is written down, and the model replaces tensors of its own again and again.
        """
        self.gradient_step.check_parameters()
        if self.written_down:
            self.gradient_step.check_steady(self.name)

    def update(self, call: Callable[[TakenFrame], Any], state: StreamState, taken: TakenFrame) -> Any:
        """`call(taken)`, which changes the weights of a video.

        Args:
            call: reads x and the context of a frame, and returns tensors, nested in lists, tuples and dicts.
            state: the video.
            taken: the frame.
        """
        return call(taken)

    def gradients(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Leave the gradients of the loss of `batch` [B, 3, H, W] in `.grad` of the parameters, and no others.

        Returns:
            The loss, a scalar without its graph.

        Raises:
            EncoderError: the loss reaches no parameter of the encoder.
        """
        step = self.gradient_step
        size = step.config.micro_batch or len(batch)
        with both_passes(step.config.precision):
            whole = size >= len(batch)
            value, found = self.one_pass(batch, generator) if whole else self._sum(batch, generator)
        for parameter, gradient in zip(step.parameters, step.of_parameters(found), strict=True):
            parameter.grad = gradient
        if all(gradient is None for gradient in found[: len(step.encoder)]):
            raise EncoderError(f"the loss reaches none of the encoder's parameters: {REPLACED}")
        return value

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of `batch` [B, 3, H, W] alone, without a gradient."""
        step = self.gradient_step
        precision = step.config.precision
        with torch.no_grad(), both_passes(precision), forward_pass(precision, step.device), step.in_pass():
            if (step.config.micro_batch or len(batch)) >= len(batch):
                return _loss(step, batch, generator, None)
            parts = _parts(step, batch, generator)
            return torch.stack([share * _loss(step, images, generator, drawn) for images, drawn, share in parts]).sum()

    def _sum(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Gradients]:
        """Loss and gradients of a batch that is taken in parts."""
        value = torch.zeros((), device=batch.device)
        found: list[Tensor | None] = [None] * len(self.gradient_step.differentiated)
        for part, drawn, share in _parts(self.gradient_step, batch, generator):
            more, others = self.one_pass(part, generator, drawn)
            value = value + more * share
            found = _added(found, others, share)
        return value, tuple(found)

    def one_pass(
        self, images: Tensor, generator: torch.Generator, drawn: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """Loss and gradients of images that go through the model at once.

        Args:
            images: [B, 3, H, W].
            generator: random source of the objective's draws.
            drawn: what the objective, a `SplitLoss`, drew for the images; None: it draws now.

        Returns:
            The loss without its graph, and the gradients; no gradient shares memory with another.
        """
        step = self.gradient_step
        again = recomputing(step.blocks, recorded=self.recorded) if step.blocks else nullcontext()
        with torch.enable_grad(), step.in_pass(), again:
            with forward_pass(step.config.precision, step.device):
                value = _loss(step, images, generator, drawn)
            found = torch.autograd.grad(value, step.differentiated, allow_unused=True)
        return value.detach(), apart(found, step.differentiated)

    def restart(self, optimizer: StreamOptimizer) -> None:
        """Make the optimizer as new before the steps of a frame."""
        optimizer.restart()

    def take_step(self, optimizer: StreamOptimizer, finite: Tensor) -> None:
        """Take the optimizer's step if `finite`, a bool scalar on the device, is true.

        On a GPU nobody waits for it, where the optimizer can leave the step out by itself.
        """
        waits = self.gradient_step.remembers or not decides_on_device(optimizer.optimizer)
        if finite.device.type == "cuda" and not waits:
            step_if(optimizer.optimizer, finite)
            self.gradient_step.after_step()
        elif bool(finite):
            optimizer.optimizer.step()
            self.gradient_step.after_step()

    def predict(self, predict: Callable[..., Any], taken: TakenFrame, around: AbstractContextManager[None]) -> Any:
        """`predict(x)`, or `predict(x, context)` where the frame has one, inside of the context manager `around`."""
        with around:
            return predict(taken.x, *taken.context)

    def forget(self) -> None:
        """Let go of everything that holds a video's tensors; it is made again when it is needed."""


def _loss(step: GradientStep, images: Tensor, generator: torch.Generator, drawn: Tensor | None) -> Tensor:
    """The objective's loss of images for which it drew `drawn`; None: it draws now."""
    objective: Any = step.objective
    images = step.half.of_pass(images)
    if drawn is None:
        return objective.loss(images, generator=generator)
    return objective.loss_of(images, drawn)


def _parts(
    step: GradientStep, batch: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Images of at most `micro_batch`, what was drawn for them, and their share in the mean over the batch."""
    parts, objective = batch.split(step.config.micro_batch or len(batch)), step.objective
    draws: Sequence[Tensor | None] = [None] * len(parts)
    weights = torch.stack([batch.new_full((), len(part)) for part in parts])
    if isinstance(objective, SplitLoss):  # draw once for the whole batch, as without parts
        draws = split = objective.draw(batch, generator).split(len(parts[0]))
        weights = torch.stack([objective.weight(part, own) for part, own in zip(parts, split, strict=True)])
    weights = weights.to(torch.promote_types(batch.dtype, torch.float32))
    yield from zip(parts, draws, weights / weights.sum(), strict=True)


def apart(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradients:
    """Gradients that may be written in place, and that lie in memory as their parameters do.

    Equal gradients can share memory, and so can the elements of one gradient. A backward pass chooses the layout of a
    gradient, and fused optimizers go through the memory of parameter and gradient side by side, whatever the strides
    say.
    """
    taken: set[int] = set()
    found: list[Tensor | None] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            place = gradient.data_ptr()
            if place in taken or not laid_out_alike(gradient, parameter):
                gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
                place = gradient.data_ptr()
            taken.add(place)
        found.append(gradient)
    return tuple(found)


def _added(found: list[Tensor | None], others: Gradients, share: Tensor) -> list[Tensor | None]:
    """`found + share * others`, in place, for each parameter that either reaches."""
    torch._foreach_mul_([g for g in others if g is not None], share)
    pairs = [(f, g) for f, g in zip(found, others, strict=True) if f is not None and g is not None]
    if pairs:
        torch._foreach_add_([f for f, _ in pairs], [g for _, g in pairs])
    return [g if f is None else f for f, g in zip(found, others, strict=True)]


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
            f"window={config.window}: set micro_batch or grad_checkpointing, or lower batch_size or crop_size first, "
            "then window, or use precision='bf16'"
        ) from error
