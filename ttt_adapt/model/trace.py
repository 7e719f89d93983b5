"""Record what a model calls during one pass: its first convolution, its norm layers, and the blocks of its lists."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ttt_adapt.model.features import tensors
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import norm_layers


class Trace:
    """A context manager that records, with hooks, the passes that run inside its block.

    Attributes:
        stem: the first convolution that was called and takes as many channels as the images have; None without one.
        stem_path: its dotted path.
        stem_inputs: shape of what it was called with, for every call.
        norms: the layers with running statistics that were called.
        lists: all lists of modules in the model, called or not.
        inputs: module of such a list -> shape of the first tensor that it was called with.

    Args:
        model: the model.
        images: the images that it will run on.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.stem: nn.Conv2d | None = None
        self.stem_path = ""
        self.stem_inputs: list[tuple[int, ...]] = []
        self.norms: set[nn.Module] = set()
        self.lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        self.inputs: dict[nn.Module, tuple[int, ...]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Trace:
        convolutions = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d)]
        children = {child for group in self.lists for child in group if child is not None}
        handles: list[Any] = [m.register_forward_pre_hook(self._see_convolution(name)) for name, m in convolutions]
        handles += [m.register_forward_hook(self._see_child, with_kwargs=True) for m in children]
        handles += [m.register_forward_pre_hook(lambda m, _a: self.norms.add(m)) for m in norm_layers(self.model)]
        self._stack.enter_context(hooks(handles))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _see_convolution(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.stem is None and module.in_channels == self.images.shape[1] and args:
                self.stem, self.stem_path = module, name  # type: ignore[assignment]
            if self.stem is module and args:
                self.stem_inputs.append(tuple(args[0].shape))

        return see

    def _see_child(self, module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        first = next(tensors([args, kwargs]), None)
        if first is not None and module not in self.inputs:
            self.inputs[module] = tuple(first.shape)
