"""The blocks that a model repeats, such as those of a transformer or of a ResNet's stages."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def repeated_blocks(
    model: nn.Module, counts: Callable[[nn.Module], bool] = lambda _block: True
) -> dict[nn.Module, list[nn.Module]]:
    """The blocks that `model` repeats -> the modules in each.

    A group is a list, or a module with several children other than lists, whose children are of one type and have
    children themselves. Its children are blocks, unless there are groups inside of them: stages hold blocks.

    Args:
        model: any module.
        counts: which modules may be blocks at all.
    """
    found = [child for group in model.modules() if _is_group(group) for child in group.children()]
    inside = {block: _inside(block) for block in dict.fromkeys(filter(counts, found))}
    return {block: inner for block, inner in inside.items() if not any(m in inside for m in inner)}


def _is_group(module: nn.Module) -> bool:
    children, kinds = list(module.children()), {type(child) for child in module.children()}
    if len(kinds) != 1 or not all(_inside(child) for child in children):
        return False
    return isinstance(module, _LISTS) or (len(children) > 1 and not issubclass(kinds.pop(), _LISTS))


_LISTS = (nn.ModuleList, nn.Sequential)


def _inside(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if m is not module]
