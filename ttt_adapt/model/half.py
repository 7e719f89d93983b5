"""Models in half precision: how they are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def half_tensors(*modules: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where modules have parameters and buffers in half precision: a table, a name in it, and the tensor."""
    for module in (module for root in modules for module in root.modules()):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype in HALF:
                    yield table, name, tensor


@contextmanager
@torch.no_grad()
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model in half precision is in float32, with the same parameter objects.

    A model is examined there: in bfloat16, rounding would look like a difference between two passes.
    """
    found = [(*place, place[2].data) for place in half_tensors(model) if not place[2].is_inference()]
    try:
        for table, name, tensor, own in found:
            if isinstance(tensor, nn.Parameter):
                tensor.data = own.float()
            else:
                table[name] = own.float()
        yield
    finally:
        for table, name, tensor, own in found:
            if isinstance(tensor, nn.Parameter):
                tensor.data = own
            else:
                table[name] = tensor
