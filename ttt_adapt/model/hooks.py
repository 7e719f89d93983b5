"""Context-managed hooks on the user's model. Nothing stays on the model outside of a `with` block.

- `run_encoder` runs the model from its input and stops where the encoder ends.
- `hidden_channel` adds the mask channel's convolution to the stem.
- `visible_tokens` lets a transformer's blocks see the visible tokens only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError


class _EncoderDone(BaseException):
    """Carries the features out of the model; a BaseException so that no `except Exception` in a model eats it."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def run_encoder(model: nn.Module, encoder: nn.Module, images: Tensor) -> Any:
    """Run `model(images)` up to and including `encoder` and return the encoder's output.

    Raises:
        EncoderError: the model finished without calling the encoder.
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise _EncoderDone(output)

    handle = encoder.register_forward_hook(stop)
    try:
        with uncompiled():
            model(images)
    except _EncoderDone as done:
        return done.output
    finally:
        handle.remove()
    raise EncoderError(
        f"the encoder ({type(encoder).__name__}) is never reached by model(images): "
        "name a module that the model calls in its forward pass"
    )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules eagerly inside the block: a graph compiled earlier knows nothing of hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_checkpointing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch activation checkpointing off inside the block: it would run blocks again after the hooks are gone."""
    found = [(m, name, vars(m)[name]) for m in modules for name in CHECKPOINT_FLAGS if name in vars(m)]
    active = [(m, name, value, off) for m, name, value in found if (off := _without(value)) is not value]
    for module, name, _, off in active:
        setattr(module, name, off)
    try:
        yield
    finally:
        for module, name, value, _ in active:
            setattr(module, name, value)


CHECKPOINT_FLAGS = ("grad_checkpointing", "gradient_checkpointing", "with_cp", "forward")
"""Where a module says that it recomputes: flags of timm, Hugging Face and OpenMMLab; MMEngine wraps its `forward`."""


def _without(value: Any) -> Any:
    """A flag that is off, or a forward that keeps its activations; anything else as it is."""
    if value is True:
        return False
    code = getattr(value, "__code__", None)
    recomputes = code is not None and "checkpoint" in code.co_names  # other wrappers move tensors or compile
    return _without(value.__wrapped__) if recomputes and hasattr(value, "__wrapped__") else value


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hook `handles` at the end of the block, whatever happens in it."""
    with ExitStack() as owned:
        for handle in handles:
            owned.callback(handle.remove)
        yield


MAX_PADDING = 64  # a model may pad to a multiple of its coarsest stride; more than that is a resize


@contextmanager
def hidden_channel(stem: nn.Module, conv: Callable[[Tensor], Tensor], hidden: Tensor) -> Iterator[None]:
    """Add `conv(hidden)` to the stem's output inside the block.

    A 4-channel stem convolution is the 3-channel one plus a 1-channel convolution of the mask. The channel here is
    1 = hidden, so a pass with nothing hidden adds nothing and the main task runs on the plain model.

    Args:
        stem: the model's first convolution.
        conv: the mask channel's convolution, [B, 1, H, W] -> [B, C, h, w].
        hidden: [B, 1, H, W], 1 where a pixel is hidden.
    """

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bottom, right = (args[0].shape[i] - hidden.shape[i] for i in (-2, -1))
        if not (0 <= bottom < MAX_PADDING and 0 <= right < MAX_PADDING):
            raise EncoderError(
                f"the stem sees {tuple(args[0].shape[-2:])} of an image of {tuple(hidden.shape[-2:])} (H, W): a model "
                "that resizes its images inside cannot be masked by pixels; let it take images as the stem sees them"
            )
        return output + conv(F.pad(hidden, (0, right, 0, bottom)))  # where the model itself pads, nothing is hidden

    with hooks([stem.register_forward_hook(add)]):
        yield


@dataclass(frozen=True)
class TokenPath:
    """Where a plain transformer's tokens run.

    Attributes:
        blocks: the blocks in the order in which they run.
        patch_size: pixels per token, in both directions.
        prefix: leading tokens (class, registers); they are always kept.
        width: channels of a token inside the blocks.
        every_block: put the tokens back in place after each block, for encoders that return intermediate features;
            otherwise after the last block only.
    """

    blocks: tuple[nn.Module, ...]
    patch_size: int
    prefix: int
    width: int
    every_block: bool = False


@contextmanager
def visible_tokens(path: TokenPath, order: Tensor, patches: int, fill: Tensor | None) -> Iterator[None]:
    """Inside the block, the transformer's blocks see only the tokens named by `order`.

    The tokens are gathered before the first block, with the rotary position embeddings that belong to them, and put
    back in place after the last one; every other place gets `fill`.

    Args:
        path: the blocks.
        order: int64 [B, n], the patch tokens to keep, in row-major numbering without prefix tokens.
        patches: number of patch tokens N of the whole image.
        fill: [C], what stands in the place of a hidden token; None: leave the gathered tokens as they are.
    """
    drop = _TokenDrop(path, order, patches, fill)
    last = len(path.blocks) - 1
    handles = []
    for i, block in enumerate(path.blocks):
        gather = drop.gather if path.every_block or i == 0 else drop.gather_rotary_only
        handles.append(block.register_forward_pre_hook(gather, with_kwargs=True))
        if fill is not None and (path.every_block or i == last):
            handles.append(block.register_forward_hook(drop.scatter))
    with hooks(handles):
        yield


class _TokenDrop:
    """The gather and scatter of one pass."""

    def __init__(self, path: TokenPath, order: Tensor, patches: int, fill: Tensor | None) -> None:
        self.batch, kept = order.shape
        prefix, self.width = path.prefix, path.width
        self.order, self.patches, self.total, self.fill = order, patches, prefix + patches, fill
        self.kept = prefix + kept
        first = torch.arange(prefix, device=order.device).expand(self.batch, prefix)
        tokens = torch.cat([first, order + prefix], dim=1)
        starts = torch.arange(self.batch, device=order.device)[:, None] * self.total
        self.flat = (tokens + starts).reshape(-1)
        self.rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def gather(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._gather(args, True), {key: self._gather(v, True) for key, v in kwargs.items()}

    def gather_rotary_only(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return self._gather(args, False), {key: self._gather(v, False) for key, v in kwargs.items()}

    def _gather(self, value: Any, tokens: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._gather(v, tokens) for v in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape == (self.batch, self.total if tokens else self.kept, self.width):
            if not tokens:  # gathered already, before the first block
                return value
            return value.flatten(0, 1).index_select(0, self.flat).view(self.batch, self.kept, -1)
        if value.shape[-2] == self.patches:
            if id(value) not in self.rotary:  # the same embedding goes to every block: gather it once
                self.rotary[id(value)] = (value, self._gather_rotary(value))
            return self.rotary[id(value)][1]
        return value

    def _gather_rotary(self, value: Tensor) -> Tensor:
        """[N, D], [heads or 1, N, D] or [B or 1, heads or 1, N, D] -> [B, heads or 1, n, D]."""
        while value.ndim < 4:
            value = value.unsqueeze(0)
        value = value.expand(self.batch, *value.shape[1:])
        index = self.order[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3])
        return value.gather(2, index)

    def scatter(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.scatter(_block, _args, output[0]), *output[1:])
        assert self.fill is not None
        full = self.fill.to(output.dtype).expand(self.batch * self.total, -1)
        return full.index_copy(0, self.flat, output.flatten(0, 1)).view(self.batch, self.total, -1)
