"""Run a model with other tensors in the place of some of its own, which stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def with_other_weights(model: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, `model` has other tensors in the place of its own; afterwards, its own objects again.

    A tensor that a model has in several places is replaced in all of them. `torch.func.functional_call` does not put
    back what it replaced where a model has one module under several names.

    Args:
        model: the model.
        others: name of a parameter or buffer -> what stands in its place.

    Raises:
        KeyError: a name of no parameter or buffer; nothing has changed.
    """
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    wanted = {id(named[name]): other for name, other in others.items()}
    places: list[tuple[dict[str, Any], str, Tensor]] = [  # every module once, however many names it has
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and id(tensor) in wanted
    ]
    try:
        for table, name, tensor in places:
            table[name] = wanted[id(tensor)]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor
