"""Hooks on the user's model, set and removed by context managers. After the `with` block none is left.

- `run_encoder` runs the model from its input and stops where the encoder ends.
- `inputs_of` stops at a call of a module and returns what it is called with.
- `hidden_channel` tells the model's first convolution which pixels are hidden.
- `visible_tokens` shows a transformer's blocks the visible tokens only.
- `uncompiled` and `without_checkpointing` switch off, for the block, what does not work together with hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError, FrameError
from ttt_adapt.model.features import tensors
from ttt_adapt.model.threads import in_this_thread


class _EncoderDone(BaseException):
    """Carries the features out of the model. It is no `Exception`, so that a model which catches those lets it pass."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def run_encoder(model: Callable[[Tensor], Any], encoder: nn.Module, images: Tensor) -> Any:
    """Run `model(images)` up to and including `encoder` and return the encoder's output.

    Raises:
        EncoderError: the model finished without calling the encoder.
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise _EncoderDone(output)

    handle = encoder.register_forward_hook(in_this_thread(stop))
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


def inputs_of(model: Callable[[Tensor], Any], module: nn.Module, images: Tensor, calls: int = 1) -> list[Any]:
    """Run `model(images)` until it calls `module` for the last of `calls` times; the module itself does not run then.

    Returns:
        For each call the first tensor that the module is called with.

    Raises:
        EncoderError: the model finished with fewer calls.
    """
    found: list[Any] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(next(tensors([args, kwargs]), None))
        if len(found) == calls:
            raise _EncoderDone(found)

    handle = module.register_forward_pre_hook(in_this_thread(note), with_kwargs=True)
    try:
        with uncompiled():
            model(images)
    except _EncoderDone:
        return found
    finally:
        handle.remove()
    raise EncoderError(f"model(images) calls {type(module).__name__} {len(found)} times; expected {calls}")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block, compiled modules run eagerly: what was compiled without hooks would not call them."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; do not import it, that takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_checkpointing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, these modules do not recompute their activations.

    They would do so in the backward pass, when the hooks are gone.
    """
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
"""Attributes that switch it on: flags of timm, Hugging Face and OpenMMLab, and `forward` where MMEngine wraps it."""


def _without(value: Any) -> Any:
    """False for a flag that is on; for a `forward` that recomputes, the one inside of it; any other value itself."""
    if value is True:
        return False
    code = getattr(value, "__code__", None)
    recomputes = code is not None and "checkpoint" in code.co_names  # other wrappers do other things: keep them
    return _without(value.__wrapped__) if recomputes and hasattr(value, "__wrapped__") else value


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks of these `handles` at the end of the block, also after an error."""
    with ExitStack() as owned:
        for handle in handles:
            owned.callback(handle.remove)
        yield


@contextmanager
def hidden_channel(stem: nn.Module, conv: Callable[[Tensor], Tensor], *told: Tensor) -> Iterator[None]:
    """Inside the block, add `conv(told)` to the output of the model's first convolution.

    Together they are one convolution over 4 channels: the image and the mask. Where nothing is hidden, nothing is
    added.

    Args:
        stem: the model's first convolution, images [B, 3, H, W] -> [B, C, h, w].
        conv: the mask channel's convolution, [B, 1, H, W] -> [B, C, h, w].
        told: [B, 1, H, W], 1 where a pixel is hidden; one for each call of the stem in a pass.

    Raises:
        EncoderError: in the pass, if the stem is called with another size.
    """
    calls = 0

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal calls
        hidden = told[calls % len(told)]
        calls += 1
        if args[0].shape[-2:] != hidden.shape[-2:] or len(args[0]) != len(hidden):
            raise EncoderError(
                f"the stem sees {tuple(args[0].shape)} where images and masks are {tuple(hidden.shape)}: a model that "
                "resizes its images inside cannot be masked by pixels; let it take images as the stem sees them"
            )
        return output + conv(hidden)

    with hooks([stem.register_forward_hook(in_this_thread(add))]):
        yield


@dataclass(frozen=True)
class TokenPath:
    """The blocks of a plain transformer, and what their tokens look like.

    Attributes:
        blocks: the blocks in the order in which they run; each takes tokens [B, prefix + N, C].
        patch_size: side of a token in pixels.
        prefix: number of leading tokens that are no patches (class, registers); they are always visible.
        width: channels C of a token.
        every_block: put the tokens back in their places after each block, for encoders that return the features of
            several blocks; otherwise after the last block only.
    """

    blocks: tuple[nn.Module, ...]
    patch_size: int
    prefix: int
    width: int
    every_block: bool = False


@contextmanager
def visible_tokens(path: TokenPath, order: Tensor, patches: int, fill: Tensor | None) -> Iterator[None]:
    """Inside this `with` block, the blocks of a transformer see only the tokens that `order` names.

    The visible tokens are gathered before the first block, together with their rotary position embeddings. After the
    last block they are put back in their places, and `fill` stands in every other place.

    Args:
        path: the transformer's blocks.
        order: int64 [B, n], the visible patch tokens, numbered row by row, without prefix tokens.
        patches: number N of patch tokens of the whole image.
        fill: [C], stands in the place of each hidden token; None: the tokens are not put back.
    """
    tokens = _VisibleTokens(path, order, patches, fill)
    last = len(path.blocks) - 1
    handles = []
    for i, block in enumerate(path.blocks):
        gather = tokens.gather if path.every_block or i == 0 else tokens.gather_rotary_only
        handles.append(block.register_forward_pre_hook(in_this_thread(gather), with_kwargs=True))
        if fill is not None and (path.every_block or i == last):
            handles.append(block.register_forward_hook(in_this_thread(tokens.put_back)))
    with hooks(handles):
        yield


class _VisibleTokens:
    """The hooks of one pass: gather the visible tokens, and put them back. Arguments as in `visible_tokens`."""

    def __init__(self, path: TokenPath, order: Tensor, patches: int, fill: Tensor | None) -> None:
        self.batch, kept = order.shape
        prefix, self.width = path.prefix, path.width
        self.order, self.patches, self.fill = order, patches, fill
        self.total, self.kept = prefix + patches, prefix + kept  # tokens of an image, all and visible
        first = torch.arange(prefix, device=order.device).expand(self.batch, prefix)  # [B, prefix]
        tokens = torch.cat([first, order + prefix], dim=1)  # [B, kept]
        starts = torch.arange(self.batch, device=order.device)[:, None] * self.total  # [B, 1]
        self.flat = (tokens + starts).reshape(-1)  # [B * kept], of the tokens of all images in a row
        self.rotary: dict[int, tuple[Tensor, Tensor]] = {}

    def gather(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a block that is called with all tokens, or again with the visible ones.

        Raises:
            FrameError: it is called with another number of tokens than the image has.
        """
        found = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
        if not any(v.shape[:2] in ((self.batch, self.total), (self.batch, self.kept)) for v in found):
            raise FrameError(
                f"the transformer's blocks are called with {[tuple(v.shape) for v in found]} for images of "
                f"{self.patches} patches; expected {self.total} tokens. The model pads such images inside, or drops or "
                'merges tokens: use frames of a size that it does not pad, or masking="pixels"'
            )
        return self._gather(args, True), {key: self._gather(v, True) for key, v in kwargs.items()}

    def gather_rotary_only(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a block that is called with the visible tokens, but with the rotary embeddings of all."""
        return self._gather(args, False), {key: self._gather(v, False) for key, v in kwargs.items()}

    def _gather(self, value: Any, tokens: bool) -> Any:
        """One argument of a block, or a tuple of them, for the visible tokens only; other values as they are."""
        if isinstance(value, tuple):
            return tuple(self._gather(v, tokens) for v in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape == (self.batch, self.total if tokens else self.kept, self.width):
            if not tokens:  # gathered before the first block
                return value
            return value.flatten(0, 1).index_select(0, self.flat).view(self.batch, self.kept, -1)
        if value.shape[-2] == self.patches:
            if id(value) not in self.rotary:  # all blocks get the same embedding: gather it once
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

    def put_back(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """After a block: [B, kept, C] -> [B, total, C], also as the first of a tuple."""
        if isinstance(output, tuple):
            return (self.put_back(_block, _args, output[0]), *output[1:])
        assert self.fill is not None
        full = self.fill.to(output.dtype).expand(self.batch * self.total, -1)
        return full.index_copy(0, self.flat, output.flatten(0, 1)).view(self.batch, self.total, -1)
