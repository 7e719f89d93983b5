"""Which of the maps that an encoder returns are read: one of each stride, and fine ones only where they have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.model.features import MapSpec, tensors

FINE = 4
"""Maps with a stride below this take most of the time of a decoder, and a patch does not need them."""


def choose_maps(
    model: nn.Module, run: Callable[[Tensor], Any], images: Tensor, specs: Sequence[MapSpec]
) -> list[MapSpec]:
    """One map of each stride, finest first: that on which most parameters act, and of equals the last one.

    A two-branch network returns its fused map first and earlier ones behind it; a dilated one returns several stages of
    one stride, the deepest last. A fine map on which parameters act that act on no coarser map, as in a U-Net, is
    marked as `own`.

    Args:
        model: the user's model.
        run: images -> what the encoder returns.
        images: random images [1, C, H, W].
        specs: all maps in the output, finest first.
    """
    strides = [spec.stride for spec in specs]
    if len(set(strides)) == len(strides) and min(strides) >= FINE:
        return list(specs)
    with learning(model):
        leaves = list(tensors(run(images)))
    acting = {spec.index: _parameters_of(leaves[spec.index]) for spec in specs}
    found: dict[int, MapSpec] = {}
    for spec in specs:
        other = found.get(spec.stride)
        if other is None or len(acting[spec.index]) >= len(acting[other.index]):
            found[spec.stride] = spec
    chosen, coarser = list[MapSpec](), set[int]()
    for stride in sorted(found, reverse=True):
        own = stride < FINE and not acting[found[stride].index] <= coarser
        chosen.insert(0, replace(found[stride], own=own))
        coarser |= acting[found[stride].index]
    return chosen


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Inside the block, passes keep their graph, and frozen parameters are part of it."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _parameters_of(tensor: Tensor) -> set[int]:
    """The ids of the parameters in the graph of a tensor."""
    nodes: list[Any] = [tensor.grad_fn]
    seen, found = set[Any](), set[int]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        nodes.extend(following for following, _ in node.next_functions)
    return found
