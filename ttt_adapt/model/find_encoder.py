"""`encoder="auto"`: find the module where a model's encoder ends.

The rule: the deepest module on which all outputs depend and whose output still has a grid. "Deepest" stops where the
head begins, which is the last part of the model that has layers of its own, and where a decoder makes the grid finer
again, as in a U-Net. A part that the model itself calls its backbone or encoder goes first. A module that hardly any
layer of the model runs before, such as the embedding of patches, goes last.

One traced pass tells what ran in which order and what depends on what; another one, at a second image size, tells which
outputs are a grid over the image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.model.features import MapSpec, tensors
from ttt_adapt.model.grid import Size, layouts, tiled
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.map_choice import learning

NAMES = ("backbone", "encoder", "image_encoder", "vision_encoder", "vision_tower", "vision_model", "visual", "trunk")
"""What models call the part whose features all heads share."""

LEAST_SHARE = 0.1
"""Share of the weights that runs before a head at least. What follows on less is a part of the encoder."""

LEAST_LAYERS = 0.1
"""Share of the layers before the head that an encoder has at least, if there is another one that has more."""


@dataclass(eq=False)
class Call:
    """One call of a module in a traced pass.

    Attributes:
        path: dotted path of the module; "" is the model itself.
        module: the module.
        start: number of calls that had begun before.
        end: number of calls that had ended before.
        shapes: of the tensors that it returned.
        nodes: their nodes in the graph of gradients; None for tensors without one.
        addresses: where they lie in memory.
        children: the calls inside of this one.
        maps: the outputs that have a grid over the image.
    """

    path: str
    module: nn.Module
    start: int
    end: int = -1
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    children: list[Call] = field(default_factory=list)
    maps: list[MapSpec] = field(default_factory=list)

    @property
    def coarsest(self) -> int:
        """The largest stride of its maps, in pixels."""
        return max(spec.stride for spec in self.maps)


def encoder_paths(model: nn.Module, images: Tensor, others: list[Size]) -> list[str]:
    """Where the encoder of `model` may end: dotted paths, the best first.

    Args:
        model: in evaluation mode.
        images: random images [1, C, H, W] that it takes.
        others: further sizes (H, W), to be tried in this order until the model takes one.
    """
    root = _traced(model, images, gradients=True)
    size = (images.shape[-2], images.shape[-1])
    _find_grids(root, [size, *others], model, images)
    fixed = not any(call.maps for call in _walk(root))  # a model that brings images of any size to one size
    if fixed:
        _find_grids(root, [size], model, images)
    shared = _shared_by_all_outputs(root)
    tops, heads = _heads(root, shared)
    inside = {call for head in heads for call in _walk(head)}
    layers = _Layers(call for call in _walk(root) if call not in inside)
    outside = inside.union(*(_above(root, top) for top in tops), _parts(root, set(shared) - inside, layers))
    candidates = _one_for_each_map([call for call in shared if call not in outside])
    coarsest = max((call.coarsest for call in candidates), default=0)

    def rank(call: Call) -> tuple[bool, bool, bool, int]:
        cell = min(spec.stride for spec in call.maps)  # images of a fixed size cannot be padded to whole cells
        whole_cells = not fixed or not any(side % cell for side in size)
        return layers.share(call) >= LEAST_LAYERS, whole_cells, call.coarsest == coarsest, call.end

    ends = sorted(candidates, key=rank, reverse=True)
    named = [call for top in tops for call in top.children if call in shared and _name(call) in _names(top.module)]
    least = not ends or layers.share(ends[0]) < LEAST_LAYERS
    whole = [root] if root.maps and not heads and (root.coarsest > coarsest or least) else []
    return list(dict.fromkeys(_public(call, root) for call in (*named, *whole, *ends)))


def _names(module: nn.Module) -> tuple[str, ...]:
    """What `module` may call its encoder; models of Hugging Face keep this name."""
    own = getattr(module, "base_model_prefix", None)
    return (*NAMES, own) if isinstance(own, str) and own else NAMES


def _name(call: Call) -> str:
    return call.path.rpartition(".")[2]


def _traced(model: nn.Module, images: Tensor, gradients: bool) -> Call:
    """Run the model once, and return the call of the model itself with all calls inside of it."""
    names = {module: name for name, module in model.named_modules()}
    open_calls, root, kept = list[Call](), list[Call](), list[Any]()
    begun, ended = 0, 0

    def enter(module: nn.Module, _args: Any) -> None:
        nonlocal begun
        call = Call(names[module], module, begun)
        begun += 1
        (open_calls[-1].children if open_calls else root).append(call)
        open_calls.append(call)

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal ended
        call = open_calls.pop()
        while call.module is not module:  # left by an exception that the model caught
            call = open_calls.pop()
        leaves = list(tensors(output))
        call.end, ended = ended, ended + 1
        call.shapes = [tuple(x.shape) if x.is_floating_point() else () for x in leaves]  # a mask is no map
        call.nodes = [x.grad_fn for x in leaves]
        call.addresses = [x.data_ptr() for x in leaves]
        kept.extend(leaves)  # so that no other tensor gets their addresses

    handles = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    with learning(model) if gradients else torch.no_grad(), hooks(handles):
        model(images.clone().requires_grad_(gradients))
    return root[0]


def _find_grids(root: Call, sizes: list[Size], model: nn.Module, images: Tensor) -> None:
    """Fill in the maps of all calls, from their shapes at the first size and at the next one that the model takes."""
    calls = list(_walk(root))
    second: list[Call] = []
    size = sizes[0]
    for size in sizes[1:]:
        try:
            second = list(_walk(_traced(model, tiled(images, size), gradients=False)))
        except Exception:  # the model does not take this size
            continue
        break
    same = len(second) == len(calls) and all(a.path == b.path for a, b in zip(calls, second, strict=True))
    for i, call in enumerate(calls):
        for index, shape in enumerate(call.shapes):
            pairs = [(sizes[0], shape)]
            if same and len(second[i].shapes) == len(call.shapes):
                pairs.append((size, second[i].shapes[index]))
            call.maps += layouts(pairs, index)[:1]


def _walk(call: Call) -> Iterator[Call]:
    """A call and all calls inside of it."""
    yield call
    for child in call.children:
        yield from _walk(child)


def _shared_by_all_outputs(root: Call) -> list[Call]:
    """The calls with a map on which every output of the model depends that depends on the images at all."""
    count: dict[nn.Module, int] = {}
    for call in _walk(root):
        count[call.module] = count.get(call.module, 0) + 1
    behind = [_ancestors(node) for node in root.nodes if node is not None]
    behind = [seen for seen in behind if _sees_images(seen)] or behind

    def shared(call: Call) -> bool:
        nodes = [call.nodes[spec.index] for spec in call.maps]
        return bool(nodes) and all(any(node in seen for node in nodes) for seen in behind)

    return [call for call in _walk(root) if count[call.module] == 1 and shared(call)]


def _ancestors(node: Any) -> set[Any]:
    """All nodes of the graph of gradients that a node was made from, itself included."""
    seen, todo = {node}, [node]
    while todo:
        for parent, _ in todo.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return seen


def _sees_images(nodes: set[Any]) -> bool:
    """Whether the images are among the leaves of a graph of gradients: all others are parameters."""
    leaves = (getattr(node, "variable", None) for node in nodes)
    return any(isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) for leaf in leaves)


def _heads(root: Call, shared: list[Call]) -> tuple[list[Call], list[Call]]:
    """The modules that hold encoder and head side by side, outermost first, and the heads.

    A part before the head that returns no map holds a head of its own, as a model does whose decoder returns queries.
    """
    known = set(shared)
    top, head = _head(root, shared)
    tops, heads = [top], [] if head is None else [head]
    while head is not None:
        before = [call for call in top.children if call.end < head.end and known & set(_walk(call))]
        if before[-1] in known:
            break
        part = before[-1]
        top, head = _head(part, shared)
        if head is None or head in known or known & _above(part, top):  # no head, but the end of an encoder
            break
        tops.append(top)
        heads.append(head)
    return tops, heads


def _head(root: Call, shared: list[Call]) -> tuple[Call, Call | None]:
    """The module that holds encoder and head side by side, and the head, or None without one.

    The head is the last part with layers of its own. A part that already gets the images holds both, so the search goes
    on inside of it.
    """
    top, known = root, set(shared)
    while True:
        parts = [call for call in top.children if any(p.ndim > 1 for p in call.module.parameters())]
        if not parts:
            return top, None
        last = parts[-1]
        before = [call for call in top.children if call.end < last.end and known & set(_walk(call))]
        if before:
            weights, whole = _weights(before), _weights(top.children)
            coarser = _coarsest(_walk(last)) > max(_coarsest(_walk(call)) for call in before)
            return top, None if coarser or weights < LEAST_SHARE * whole else last
        top = last


def _coarsest(calls: Iterable[Call]) -> int:
    return max((call.coarsest for call in calls if call.maps), default=0)


def _weights(calls: Iterable[Call]) -> int:
    """How many weights some modules have together."""
    return sum(p.numel() for p in dict.fromkeys(p for call in calls for p in call.module.parameters()))


class _Layers:
    """Which layers run before what.

    Args:
        calls: all calls that are no part of the head.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        ends: dict[Tensor, int] = {}  # weight -> when it is used first
        for call in calls:
            for p in call.module.parameters(recurse=False):
                if p.ndim > 1:
                    ends[p] = min(call.end, ends.get(p, call.end))
        self._ends = sorted(ends.values())

    def share(self, call: Call) -> float:
        """Which part of the layers has run when a call ends, in [0, 1]."""
        return bisect_right(self._ends, call.end) / max(len(self._ends), 1)


def _parts(root: Call, shared: set[Call], layers: _Layers) -> set[Call]:
    """The calls inside of blocks and of poolings: gates, projections and the like, which are no end of an encoder.

    A block returns a map itself; one inside of another, as in a stage, may be an end. A pooling follows a map behind
    which at most half of the layers are left, and returns none.
    """
    found = set[Call]()
    for call in _walk(root):
        if call in shared and _is_block(call, root):
            found |= {part for part in _walk(call) if part is not call and not _is_block(part, root)}
        late = False
        for child in call.children:
            if late and not child.maps:
                found |= set(_walk(child))
            late = late or (child in shared and layers.share(child) >= 0.5)
    return found


def _is_block(call: Call, root: Call) -> bool:
    """Whether a call is that of a module of parts, in a list that has another member of its class."""
    parent = call.path.rpartition(".")[0]
    group = root.module.get_submodule(parent)
    if not isinstance(group, nn.ModuleList | nn.Sequential) or isinstance(call.module, nn.Sequential):
        return False
    if not any(True for _ in call.module.children()):
        return False
    return sum(type(member) is type(call.module) for member in group) > 1


def _above(root: Call, top: Call) -> set[Call]:
    """`top` and the calls that it runs in: they hold the head."""
    return {call for call in _walk(root) if call is top or (call.start < top.start and call.end > top.end)}


def _one_for_each_map(calls: list[Call]) -> list[Call]:
    """Of the calls that return the same map, the outermost with weights."""
    found: dict[tuple[int, tuple[int, ...]], Call] = {}
    for call in calls:  # in the order in which they began: the outermost comes first
        if any(True for _ in call.module.parameters()):
            index = call.maps[-1].index
            found.setdefault(
                (call.addresses[index], call.shapes[index]), call
            )  # a part of a map may begin where it does
    known = {address for address, _ in found}
    weightless = [call for call in calls if call.addresses[call.maps[-1].index] not in known]
    return [*dict.fromkeys(found.values()), *weightless]


def outermost(paths: list[str]) -> list[str]:
    """Those of some dotted paths that lie inside of no other one, in their order."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _public(call: Call, root: Call) -> str:
    """The path of a call, or that of the list whose last member it is."""
    parent, _, _ = call.path.rpartition(".")
    group = root.module.get_submodule(parent) if parent else None
    if isinstance(group, nn.ModuleList):
        ran = [each for each in _walk(root) if each.path.rpartition(".")[0] == parent]
        if max(ran, key=lambda each: each.end) is call:
            return parent
    return call.path
