"""Activation checkpointing in the gradient step: blocks that run again in the backward pass, for less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Size, Tensor, device, dtype, is_grad_enabled, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointError, checkpoint

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.blocks import repeated_blocks
from ttt_adapt.model.hooks import uncompiled, without_checkpointing


def blocks_to_repeat(model: nn.Module, parameters: Iterable[Tensor]) -> dict[nn.Module, list[nn.Module]]:
    """The blocks that `model` repeats (`ttt_adapt.model.blocks`) -> the modules in each.

    Args:
        model: any module.
        parameters: what is differentiated by; blocks without any of them are left out.

    Raises:
        ConfigError: there are none.
    """
    adapted = {id(p) for p in parameters}
    blocks = repeated_blocks(model, lambda block: any(id(p) in adapted for p in block.parameters()))
    if not blocks:
        raise ConfigError(
            f"grad_checkpointing is True, but the encoder of this {type(model).__name__} has no repeated blocks to "
            "run again: set micro_batch instead"
        )
    return blocks


@contextmanager
def recomputing(blocks: Mapping[nn.Module, Sequence[nn.Module]], recorded: bool = False) -> Iterator[None]:
    """Inside the block of code, these modules keep only their inputs, and run again in the backward pass.

    The backward pass must be inside of the block of code too. The model's own checkpointing is off there, because it
    does not work with `torch.autograd.grad`. Modules with inner hooks or unusual inputs are not checkpointed: a hook
    may be gone when the module runs again, or would be called twice; and an input that is no tensor and no plain value
    may have changed.

    Args:
        blocks: as `blocks_to_repeat` found them.
        recorded: whether the pass may be recorded. A recording cannot put PyTorch's random source back, so a module
            draws anew when it runs again.

    Raises:
        ConfigError: a block cannot run again on what it was given, with the weights that it had.
    """
    with uncompiled(), without_checkpointing(m for block, inner in blocks.items() for m in (block, *inner)):
        own = {block: vars(block).get("forward") for block in blocks}
        try:
            for block, inner in blocks.items():
                block.forward = partial(_run, block.forward, (block, *inner), not recorded)
            yield
        except RuntimeError as error:
            if isinstance(error, CheckpointError) or "modified by an inplace operation" in str(error):
                raise ConfigError(
                    "grad_checkpointing is True, but a block of this model does not run again as it ran: it changes "
                    "its input in place, or the model changes that input afterwards: set micro_batch instead"
                ) from error
            raise
        finally:
            for block, forward in own.items():
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward


def _run(forward: Callable[..., Any], modules: Sequence[nn.Module], redraw: bool, *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass, checkpointed where that changes nothing but the memory.

    Args:
        forward: the block's own.
        modules: the block, and all that are inside of it.
        redraw: whether PyTorch's random source is put back before the block runs again.
        args: the arguments of the block.
        kwargs: its keywords.
    """
    if not is_grad_enabled() or any(m._forward_hooks or m._forward_pre_hooks for m in modules[1:]):
        return forward(*args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))  # the model may change its lists before the second time
    if not all(leaf is None or isinstance(leaf, _VALUES) for leaf in leaves):
        return forward(*args, **kwargs)
    first, state = [(args, kwargs)], _state(modules)

    def run(*_tensors: Tensor) -> Any:
        if not first and _state(modules) != state:
            raise ConfigError(
                "grad_checkpointing is True, but the objective gives blocks of the model other weights or another mode "
                "only while it takes its loss, so the blocks cannot run again: set micro_batch instead"
            )
        given, named = first.pop() if first else tree_unflatten(leaves, structure)
        return forward(*given, **named)

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]  # PyTorch watches that they stay as they are
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=redraw)


_VALUES = (Tensor, bool, int, float, str, Size, dtype, device)


def _state(modules: Sequence[nn.Module]) -> list[Any]:
    """The mode of the modules, their weights, and how often the weights were changed."""
    return [(m.training, *((id(p), p._version) for p in m._parameters.values() if p is not None)) for m in modules]
