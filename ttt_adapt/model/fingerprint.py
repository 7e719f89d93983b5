"""A hash of weights, by which calibrations and saved streams know the model that they belong to.

A model that was only cast is the same model, although its weights were rounded. So weights are compared at the
precision of the coarser of two models, as far as hashes of one of them tell:

| the hash was made of | known as the same |
|---|---|
| a model in float32 or float64 | its copies in float16, in bfloat16, and these two in any wider precision |
| its copy in float16 | the model, the copy in any wider precision |
| its copy in bfloat16 | the model, the copy in any other precision |

A copy in float16 and one in bfloat16 are rounded differently, and neither tells what the other was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint_of(model: nn.Module, *through: torch.dtype) -> str:
    """A hash of all parameters and buffers, as `fingerprint` makes it."""
    return fingerprint(model.state_dict(), *through)


def fingerprint(tensors: Mapping[str, Any], *through: torch.dtype) -> str:
    """A hash of named tensors, in half precision; what is no tensor is left out.

    Args:
        tensors: by name.
        through: the precisions that they are rounded to, one after the other; float16 alone by default.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            tensor = tensor.detach()
            for dtype in (through or (torch.float16,)) if tensor.is_floating_point() else ():
                tensor = tensor.to(dtype)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            plain = tensor.contiguous().cpu()
            digest.update((plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes())
    return digest.hexdigest()[:32]


def is_same_model(model: nn.Module, exact: str, rounded: str) -> bool:
    """Whether a model is the one that hashes were made of, or a cast of it, or was cast to it.

    Args:
        model: as it is.
        exact: `fingerprint_of` of the other.
        rounded: `fingerprint_of` of the other, rounded to bfloat16; "" where it is not known.
    """
    if fingerprint_of(model) == exact:
        return True
    if rounded and _is_in_bfloat16(model) and fingerprint_of(model, torch.bfloat16) == rounded:
        return True
    return fingerprint_of(model, torch.bfloat16, torch.float16) == exact  # the other is this one in bfloat16


def _is_in_bfloat16(model: nn.Module) -> bool:
    """Whether weights are in bfloat16, or all of them were rounded to it and are in another precision now."""
    weights = [tensor for tensor in model.state_dict().values() if isinstance(tensor, Tensor)]
    if any(tensor.dtype == torch.bfloat16 for tensor in weights):
        return True
    return all(torch.equal(t.to(torch.bfloat16).to(t.dtype), t) for t in weights if t.is_floating_point())
