"""The eager engine: forward and backward as PyTorch runs them. The other engines change one part of it each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.precision import both_passes, forward_pass
from ttt_adapt.engine.recompute import recomputing, repeated_blocks
from ttt_adapt.errors import ConfigError, EncoderError, MemoryLimitError
from ttt_adapt.model.replaced import ReplacementCounter
from ttt_adapt.objectives.base import Objective, SplitLoss
from ttt_adapt.stream.optimizer import laid_out_alike

PATIENCE = 8
"""Steps in a row before which a model may have put other tensors in the place of its own."""


@dataclass
class Problem:
    """What a gradient step differentiates.

    Attributes:
        objective: whose loss.
        parameters: by what; one that the loss does not reach gets no gradient.
        encoder: how many of them, from the first, are the encoder's.
        generator: the stream's random source.
        config: the stream's settings.
        device: where it runs.
        watch: on the model and what the objective has of its own.
        version: of the watch, when the parameters were last found to be those.
        blocks: those that run again in the backward pass -> the modules in each; none without `grad_checkpointing`.

    Raises:
        ConfigError: `grad_checkpointing` without blocks to run again.
    """

    objective: Objective
    parameters: list[nn.Parameter]
    encoder: int
    generator: torch.Generator
    config: StreamConfig
    device: torch.device
    watch: ReplacementCounter = field(init=False)
    version: int = field(init=False, default=-1)
    blocks: dict[nn.Module, list[nn.Module]] = field(init=False, default_factory=dict)
    _changes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        own = [self.objective] if isinstance(self.objective, nn.Module) else []
        self.watch = ReplacementCounter(self.objective.model, *own)
        if self.config.grad_checkpointing:
            self.blocks = repeated_blocks(self.objective.model, self.parameters)

    def check_parameters(self) -> None:
        """Refuse a model whose weights are no longer those that are differentiated by.

        The objective is asked for them where something was replaced since the last time.

        Raises:
            EncoderError: other parameters stand in their place.
        """
        version = self.watch.count()
        if version == self.version:
            self._changes = 0
            return
        self._changes += 1
        now = self.objective.encoder_parameters().values()
        if len(now) != self.encoder or any(p is not q for p, q in zip(now, self.parameters, strict=False)):
            raise EncoderError(f"the encoder's parameters are not those that are adapted: {_REPLACED}")
        own = self.parameters[self.encoder :]
        if own and not {id(p) for p in own} <= {id(p) for _, p in self.objective.named_parameters()}:
            raise EncoderError(f"the branch's parameters are not those that are adapted: {_REPLACED}")
        self.version = version

    def check_steady(self, engine: str) -> None:
        """Refuse a model that nothing written down once can follow.

        Raises:
            ConfigError: it puts other tensors in the place of its own again and again.
        """
        if self._changes > PATIENCE:
            raise ConfigError(
                f"the model puts another tensor in the place of its {self.watch.last_replaced!r} at every frame, which "
                f'engine={engine!r} cannot follow: use engine="eager"'
            )


Gradients = tuple[Tensor | None, ...]

_REPLACED = (
    "they were replaced after the branch was attached (by load_state_dict(assign=True), for example); attach again"
)


class EagerEngine:
    """Runs everything as it is called.

    Args:
        reason: why this engine was picked, for people.
    """

    name = "eager"
    records = False  # whether `run` may repeat a call without running its Python again
    strict = False  # whether what it cannot repeat is refused, instead of being run as it is called

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
        size = problem.config.micro_batch or len(batch)
        with both_passes(problem.config.precision):
            value, found = self.one_pass(problem, batch) if size >= len(batch) else self._sum(problem, batch)
        for parameter, gradient in zip(problem.parameters, found, strict=True):
            parameter.grad = gradient
        if all(gradient is None for gradient in found[: problem.encoder]):
            raise EncoderError(f"the loss reaches none of the encoder's parameters: {_REPLACED}")
        return value

    def loss(self, problem: Problem, batch: Tensor) -> Tensor:
        """The loss of `batch` [B, 3, H, W] alone, without a gradient."""
        precision = problem.config.precision
        with torch.no_grad(), both_passes(precision), forward_pass(precision, problem.device):
            if (problem.config.micro_batch or len(batch)) >= len(batch):
                return _loss(problem, batch, None)
            parts = _parts(problem, batch)
            return torch.stack([share * _loss(problem, images, drawn) for images, drawn, share in parts]).sum()

    def _sum(self, problem: Problem, batch: Tensor) -> tuple[Tensor, Gradients]:
        """Loss and gradients of a batch that is taken in parts."""
        value = torch.zeros((), device=batch.device)
        found: list[Tensor | None] = [None] * len(problem.parameters)
        for part, drawn, share in _parts(problem, batch):
            more, others = self.one_pass(problem, part, drawn)
            value = value + more * share
            found = _added(found, others, share)
        return value, tuple(found)

    def one_pass(self, problem: Problem, images: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Gradients]:
        """Loss and gradients of images that go through the model at once.

        Args:
            problem: what is differentiated.
            images: [B, 3, H, W].
            drawn: what the objective, a `SplitLoss`, drew for them; None: it draws now.

        Returns:
            The loss, detached, and the gradients, none of which shares memory with another.
        """
        again = recomputing(problem.blocks, recorded=self.records) if problem.blocks else nullcontext()
        with torch.enable_grad(), again:
            with forward_pass(problem.config.precision, problem.device):
                value = _loss(problem, images, drawn)
            found = torch.autograd.grad(value, problem.parameters, allow_unused=True)
        return value.detach(), apart(found, problem.parameters)

    def predict(self, predict: Callable[[Tensor], Any], x: Tensor, key: Hashable = ()) -> Any:
        """`predict(x)`; `key` as in `run`."""
        return predict(x)

    def forget(self) -> None:
        """Drop everything that holds on to the stream's tensors; it is made again when it is needed."""


def _loss(problem: Problem, images: Tensor, drawn: Tensor | None) -> Tensor:
    """The objective's loss of images for which it drew `drawn`; None: it draws now."""
    objective: Any = problem.objective
    if drawn is None:
        return objective.loss(images, generator=problem.generator)
    return objective.loss_of(images, drawn)


def _parts(problem: Problem, batch: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Images of at most `micro_batch`, what was drawn for them, and their share in the mean over the batch."""
    parts, objective = batch.split(problem.config.micro_batch or len(batch)), problem.objective
    draws: Sequence[Tensor | None] = [None] * len(parts)
    weights = torch.stack([batch.new_full((), len(part)) for part in parts])
    if isinstance(objective, SplitLoss):  # once for the whole batch, as without parts
        draws = split = objective.draw(batch, problem.generator).split(len(parts[0]))
        weights = torch.stack([objective.weight(part, own) for part, own in zip(parts, split, strict=True)])
    weights = weights.to(torch.promote_types(batch.dtype, torch.float32))
    yield from zip(parts, draws, weights / weights.sum(), strict=True)


def apart(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Gradients:
    """Gradients that may be written in place, and that lie in memory as their parameters do.

    Equal gradients can share memory, and so can the elements of one. A backward pass lays gradients out as it likes,
    and fused optimizers go through the memory of parameter and gradient side by side, whatever the strides say.
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
