"""Modules that leave out tokens in training mode, such as patch dropout, found by trial and kept from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import tensors
from ttt_adapt.model.hooks import hooks, run_encoder
from ttt_adapt.model.norms import frozen_norms, norm_layers
from ttt_adapt.model.probe import in_evaluation

ROUNDS = 4
"""How many such modules may come one behind the other."""

Calls = dict[nn.Module, list[tuple[Any, Any]]]
"""Module -> shapes of the first tensors that it takes and returns, for every call."""


def token_droppers(model: nn.Module, encoder: nn.Module, images: Tensor) -> list[nn.Module]:
    """The modules that return tensors of another shape in training mode than in evaluation mode.

    A masked pass hides patches by its own mask alone, and these modules must not hide others beside. They are found by
    a pass in training mode. Running statistics and PyTorch's random state stay as they were.

    Args:
        model: the user's model, in evaluation mode.
        encoder: the module where the encoder ends.
        images: [1, 3, H, W].

    Raises:
        EncoderError: the encoder's output in training mode has another shape than in evaluation mode, whatever single
            modules are kept in evaluation mode.
    """
    plain = _Shapes(model, encoder, images)
    if not any(len(seen) == 3 for calls in plain.calls.values() for seen, _ in calls if seen is not None):
        return []  # there are no tokens
    with torch.random.fork_rng([images.device] if images.is_cuda else []), _training(model):

        def trained(kept: list[nn.Module]) -> _Shapes:
            with in_evaluation(kept), frozen_norms(norm_layers(model)):
                return _Shapes(model, encoder, images)

        found: list[nn.Module] = []
        for _ in range(ROUNDS):
            seen = trained(found)
            if seen.output == plain.output:
                return found
            more = [m for m in _changed(plain.calls, seen.calls) if m not in found]
            if not more:  # it may be one that calls the encoder, or that holds it
                more = next(([m] for m in seen.open if trained([*found, m]).output == plain.output), [])
            if not more:
                break
            found += more
    if seen.output is None:
        return found  # it cannot be trained on images alone, so there are no passes to keep tokens in
    raise EncoderError(
        f"in training mode the encoder returns {seen.output} for images {tuple(images.shape)}, in evaluation mode "
        f"{plain.output}: it leaves out or merges tokens in training, and cannot be trained on masked images; switch "
        "that off, or attach with another encoder"
    )


class _Shapes:
    """Shapes in one pass to the end of the encoder.

    Attributes:
        output: of all tensors that the encoder returns; None if the pass failed.
        calls: of the first tensors that each module takes and returns, for every call that came to its end.
        open: modules whose call did not come to its end, the innermost first: they call the encoder.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module, images: Tensor) -> None:
        self.output: list[Any] | None = None
        self.calls: Calls = {}
        self.open: list[nn.Module] = []
        handles = [m.register_forward_pre_hook(lambda m, _args: self.open.insert(0, m)) for m in model.modules()]
        handles += [m.register_forward_hook(self._see, with_kwargs=True) for m in model.modules()]
        with torch.no_grad(), hooks(handles):
            try:
                self.output = [tuple(x.shape) for x in tensors(run_encoder(model, encoder, images))]
            except Exception:  # behind a module that leaves out tokens, or because training takes more than images
                self.output = None

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.open.remove(module)
        first = (next(tensors(value), None) for value in ([args, kwargs], [output]))
        seen, returned = (None if tensor is None else tuple(tensor.shape) for tensor in first)
        self.calls.setdefault(module, []).append((seen, returned))


def _changed(plain: Calls, trained: Calls) -> list[nn.Module]:
    """The innermost modules that return another shape in `trained` than in `plain`, for the same input."""
    changed = []
    for module, calls in trained.items():
        pairs = list(zip(plain.get(module, []), calls, strict=False))
        if any(a[0] == b[0] and a[1] != b[1] for a, b in pairs):
            changed.append(module)
    return [m for m in changed if not any(inner is not m and inner in changed for inner in m.modules())]


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Inside the block, every module is in training mode; afterwards each is as it was."""
    before = [(m, m.training) for m in model.modules()]
    for m, _ in before:
        m.training = True
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
