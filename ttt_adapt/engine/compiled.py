"""The compile engine: loss, backward pass and prediction through `torch.compile`.

The branch's hooks exist only during its own passes, and `torch.compile` would have to follow their Python code. So the
pass is traced first, with the hooks in place: the result is a list of tensor operations, forward and backward in one,
without Python. That list is compiled, so nothing breaks its graph or causes a recompilation. Random draws are made
outside of it, where the other engines make them. One list is kept for each shape of the images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.engine.eager import EagerEngine, Gradients, apart
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.engine.precision import forward_pass
from ttt_adapt.errors import ConfigError, TTTAdaptError
from ttt_adapt.model.frames import TakenFrame

KEPT = 4  # shapes whose compiled passes are kept


class CompileEngine(EagerEngine):
    """Compiles the pass of each image shape once.

    Args:
        step: what is differentiated.
        reason: why this engine was picked.
        backend: of `torch.compile`.
    """

    name = "compile"
    written_down = True

    def __init__(self, step: GradientStep, reason: str = "asked for", backend: str = "inductor") -> None:
        super().__init__(step, reason)
        self._backend = backend
        self._passes: OrderedDict[Hashable, tuple[Callable[..., list[Tensor]], list[int]]] = OrderedDict()
        self._predictions: OrderedDict[Hashable, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = (
            OrderedDict()
        )

    @property
    def kept(self) -> tuple[int, int]:
        """How many compiled passes and compiled predictions are kept."""
        return len(self._passes), len(self._predictions)

    def one_pass(
        self, images: Tensor, generator: torch.Generator, drawn: Tensor | None = None
    ) -> tuple[Tensor, Gradients]:
        """As in `EagerEngine`."""
        step = self.gradient_step
        objective: Any = step.objective
        drawn = objective.draw(images, generator) if drawn is None else drawn
        # a list reads the very tensors that the model had when it was written down
        key = (tuple(images.shape), images.dtype, images.stride(), objective.settings(), step.version)
        known = self._passes.pop(key, None)
        # the gradients are in the list, and so are the casts: a caller's autocast adds none
        with torch.no_grad(), forward_pass("fp32", step.device), nullcontext() if known else _explained():
            compiled, reached = known or self._compiled(images, drawn)
            value, *gradients = compiled(images, drawn)  # the first time, the compiler runs
        self._passes[key] = compiled, reached
        while len(self._passes) > KEPT:
            self._passes.popitem(last=False)
        found: list[Tensor | None] = [None] * len(step.differentiated)
        for index, gradient in zip(reached, gradients, strict=True):
            found[index] = gradient
        return value, apart(found, step.differentiated)

    def _compiled(self, images: Tensor, drawn: Tensor) -> tuple[Callable[..., list[Tensor]], list[int]]:
        """The compiled pass, and which of the parameters it has gradients for."""
        from torch.fx.experimental.proxy_tensor import make_fx

        step = self.gradient_step
        objective: Any = step.objective
        reached: list[int] = []

        def both(images: Tensor, drawn: Tensor) -> list[Tensor]:
            with torch.enable_grad(), step.half.in_pass():
                with forward_pass(step.config.precision, step.device):
                    value = objective.loss_of(step.half.of_pass(images), drawn)
                found = torch.autograd.grad(value, step.differentiated, allow_unused=True)
            reached[:] = [i for i, gradient in enumerate(found) if gradient is not None]
            return [value.detach(), *(gradient for gradient in found if gradient is not None)]

        # tracing runs the pass once; the random source goes back after it, for the first real run
        with torch.no_grad(), torch.random.fork_rng(_devices(step.device)):
            operations = make_fx(both)(images, drawn)
        return self._compile(operations, fullgraph=True), reached

    def _compile(self, call: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
        # stochastic depth draws from PyTorch's random source, as in the eager engine, but not always the same numbers
        options: Any = {"fallback_random": True} if self._backend == "inductor" else None
        return torch.compile(call, fullgraph=fullgraph, dynamic=False, backend=self._backend, options=options)

    def predict(self, predict: Callable[..., Any], taken: TakenFrame, around: AbstractContextManager[None]) -> Any:
        """As in `EagerEngine`, with `predict` compiled; the compiler watches what else it depends on.

        A prediction with a context runs eagerly: the context is another object for every frame.
        """
        if taken.context:
            self.note("predictions run eagerly: their frames come with a context")
            return super().predict(predict, taken, around)
        x = taken.x
        shape = (tuple(x.shape), x.dtype, x.stride())
        if shape not in self._predictions or self._predictions[shape][0] is not predict:
            self._predictions[shape] = (predict, self._compile(_afresh(lambda x: predict(x))))
            while len(self._predictions) > KEPT:
                self._predictions.popitem(last=False)
        self._predictions.move_to_end(shape)
        with around:
            return self._predictions[shape][1](x)

    def forget(self) -> None:
        """Nothing to do: compiled passes hold no tensors of a video."""


def _devices(device: torch.device) -> list[torch.device]:
    """The devices, other than the CPU, whose random source a pass may draw from."""
    return [device] if device.type == "cuda" else []


@contextmanager
def _explained() -> Iterator[None]:
    """If a pass cannot be traced or compiled, raise an error that says which engine to use."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, TTTAdaptError):
        raise
    except Exception as error:  # a compiler, or a model that reads values while it is traced, may raise anything
        if "allocate memory" in str(error):
            raise
        raise ConfigError(
            f'the gradient step of this model cannot be compiled ({type(error).__name__}: {error}): use engine="eager"'
        ) from error


def _afresh(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: the compiler allows each code object only so many compilations."""
    assert isinstance(call, FunctionType)
    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__)
