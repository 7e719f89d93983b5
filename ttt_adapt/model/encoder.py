"""Look at a model once and find what adaptation needs: the encoder, its features, stem, parameters and token path.

Everything here reads; nothing is changed on the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError, nearest
from ttt_adapt.model.features import MAX_PREFIX, MapSpec, describe, tensors
from ttt_adapt.model.hooks import (
    CHECKPOINT_FLAGS,
    TokenPath,
    hooks,
    run_encoder,
    uncompiled,
    visible_tokens,
    without_checkpointing,
)
from ttt_adapt.model.norms import norm_layers


@dataclass(frozen=True)
class EncoderInfo:
    """An encoder, as `inspect_encoder` found it.

    Attributes:
        model: the user's model.
        path: dotted path of the module where the encoder ends ("" is the model itself).
        module: that module.
        stem: the first convolution that sees the images; None where there is none.
        stem_path: its dotted path.
        maps: the encoder's feature maps, finest first.
        parameters: name -> parameter, all that the features depend on.
        checkpointing: modules that can recompute their activations in the backward pass.
        tokens: where the tokens run, for plain transformers; None for every other encoder.
        probe_size: (H, W) of the images it was looked at with.
        called_norms: dotted path -> layer with running statistics, for all that an encoder pass calls.
    """

    model: nn.Module = field(repr=False)
    path: str
    module: nn.Module = field(repr=False)
    stem: nn.Conv2d | None = field(repr=False)
    stem_path: str
    maps: list[MapSpec]
    parameters: dict[str, nn.Parameter] = field(repr=False)
    checkpointing: list[nn.Module] = field(repr=False)
    tokens: TokenPath | None = field(repr=False)
    probe_size: tuple[int, int]
    called_norms: dict[str, nn.Module] = field(repr=False)

    @property
    def norms(self) -> list[nn.Module]:
        """The layers with running statistics that an encoder pass may touch, as they are now.

        Frameworks for distributed training put others in their place after a branch was attached.
        """
        adapted = {id(p) for p in self.parameters.values()}
        now = dict(self.model.named_modules(remove_duplicate=False))
        called = {*self.called_norms.values(), *(now[path] for path in self.called_norms if path in now)}
        norms = norm_layers(self.model)
        return [n for n in norms if n in called or any(id(p) in adapted for p in n.parameters())]

    def probe_images(self) -> Tensor:
        """Fixed random images [1, 3, H, W] of `probe_size`, on the model's device."""
        return _probe_images(self.model, self.probe_size)


def inspect_encoder(
    model: nn.Module, encoder: str | nn.Module, image_size: int | tuple[int, int] | None = None
) -> EncoderInfo:
    """Find what adaptation needs in `model`, by running it on random images.

    Args:
        model: any module that takes images [B, 3, H, W].
        encoder: dotted path of the module where the encoder ends, or the module.
        image_size: (H, W) or side of the probe images; found from the model without it.

    Raises:
        EncoderError: unknown path, an encoder that is never reached, features of unknown layout, or nothing to adapt.
    """
    if not isinstance(model, nn.Module):
        raise EncoderError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    path, module = _find_encoder(model, encoder)
    if not any(True for _ in model.parameters()):
        raise EncoderError(f"{type(model).__name__} has no parameters: there is nothing to adapt")
    if any(p.is_inference() for p in model.parameters()):
        raise EncoderError("the model was made under torch.inference_mode() and cannot learn: make it outside of it")
    failures = []
    for size in _probe_sizes(model, image_size):
        with evaluating(model), torch.inference_mode(False), uncompiled(), without_checkpointing(_checkpointing(model)):
            try:
                return _inspect(model, path, module, size)
            except EncoderError:
                raise
            except Exception as error:  # the model refuses this size: try the next
                failures.append(f"{size[0]} x {size[1]}: {type(error).__name__}: {error}")
    raise EncoderError(
        "the model could not be run on random images to look at its encoder; tried "
        + "; ".join(failures)
        + ". Pass image_size=(H, W) with a size that it takes"
    )


def _inspect(model: nn.Module, path: str, module: nn.Module, size: tuple[int, int]) -> EncoderInfo:
    images = _probe_images(model, size)
    module = _called(model, path, module, images)
    with torch.no_grad(), _Trace(model, images) as trace:
        output = run_encoder(model, module, images)
    stem = trace.stem
    stride = _side(stem.stride) if stem is not None else None
    if stride and stride > 2 and any(side % stride for side in size):  # a model may pad inside: look at whole patches
        return _inspect(model, path, module, (size[0] - size[0] % stride, size[1] - size[1] % stride))
    maps = describe(output, size, stride)
    parameters = _used_parameters(model, module, images, maps)
    info = EncoderInfo(
        model,
        path,
        module,
        stem,
        trace.stem_path,
        maps,
        parameters,
        _checkpointing(model),
        None,
        size,
        _paths_of(model, trace.norms),
    )
    return dataclasses.replace(info, tokens=_token_path(info, trace, stride))


def _paths_of(model: nn.Module, modules: set[nn.Module]) -> dict[str, nn.Module]:
    """Every dotted path that leads to one of `modules`."""
    return {path: m for path, m in model.named_modules(remove_duplicate=False) if m in modules}


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(hasattr(m, flag) for flag in CHECKPOINT_FLAGS)]


def _find_encoder(model: nn.Module, encoder: str | nn.Module) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if not isinstance(encoder, str | nn.Module):
        raise EncoderError(
            f"the encoder is {encoder!r}; expected the dotted path of a module of {type(model).__name__}, or the "
            f"module itself; {nearest(str(encoder), filter(None, modules))}"
        )
    if isinstance(encoder, nn.Module):
        for name, module in modules.items():
            if module is encoder:
                return name, module
        raise EncoderError(f"the encoder ({type(encoder).__name__}) is not a module of this {type(model).__name__}")
    if encoder not in modules and f"_orig_mod.{encoder}" in modules:  # the model is wrapped by torch.compile
        encoder = f"_orig_mod.{encoder}"
    if encoder not in modules:
        raise EncoderError(
            f"{type(model).__name__} has no module {encoder!r}; {nearest(encoder, filter(None, modules))}"
        )
    return encoder, modules[encoder]


def _called(model: nn.Module, path: str, module: nn.Module, images: Tensor) -> nn.Module:
    """`module`, or the last of its children for a list that the model loops over instead of calling it."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return module
    ran: list[nn.Module] = []
    watched = [module, *module]
    with hooks(m.register_forward_hook(lambda m, _a, _o: ran.append(m)) for m in watched), torch.no_grad():
        model(images)
    if module in ran:
        return module
    if not ran:
        raise EncoderError(
            f"the encoder {path!r} is never reached by model(images): name a module that the model calls"
        )
    return ran[-1]


def _used_parameters(
    model: nn.Module, module: nn.Module, images: Tensor, maps: list[MapSpec]
) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    frozen = [p for p in named.values() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.enable_grad():
            images = images.clone().requires_grad_(True)
            leaves = list(tensors(run_encoder(model, module, images)))
            total = sum(leaves[spec.index].float().square().sum() for spec in maps)
        if not (isinstance(total, Tensor) and total.requires_grad):
            raise EncoderError(
                "the encoder's features have no gradient: it runs under torch.no_grad() or has no parameters to adapt"
            )
        *gradients, seen = torch.autograd.grad(total, [*named.values(), images], allow_unused=True)
        if seen is None:
            raise EncoderError("the encoder's features do not depend on the images: name a module that sees them")
        if all(gradient is None for gradient in gradients):
            raise EncoderError("the encoder's features have no gradient by any parameter: there is nothing to adapt")
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return {name: p for (name, p), g in zip(named.items(), gradients, strict=True) if g is not None}


class _Trace:
    """Records, during one pass, the stem, the layers with running statistics, and the inputs of lists' children."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.stem: nn.Conv2d | None = None
        self.stem_path = ""
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.norms: set[nn.Module] = set()
        self.lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        self.named = list(model.named_modules())
        self._stack = ExitStack()

    def __enter__(self) -> _Trace:
        handles: list[Any] = [
            m.register_forward_pre_hook(self._see_stem(name)) for name, m in self.named if isinstance(m, nn.Conv2d)
        ]
        children = {child for group in self.lists for child in group}
        handles += [m.register_forward_hook(self._see_block, with_kwargs=True) for m in children]
        handles += [m.register_forward_pre_hook(lambda m, _a: self.norms.add(m)) for m in norm_layers(self.model)]
        self._stack.enter_context(hooks(handles))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _see_stem(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.stem is None and module.in_channels == self.images.shape[1] and args:
                self.stem, self.stem_path = module, name  # type: ignore[assignment]

        return see

    def _see_block(self, module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        first = next(tensors([args, kwargs]), None)
        if first is not None and module not in self.shapes:
            self.shapes[module] = tuple(first.shape)


def _token_path(info: EncoderInfo, trace: _Trace, stride: int | None) -> TokenPath | None:
    """The transformer's blocks, if dropping tokens is sound for this encoder: tried out, not guessed from a name."""
    if stride is None:
        return None
    patches = (info.probe_size[0] // stride) * (info.probe_size[1] // stride)
    for group in sorted(trace.lists, key=len, reverse=True):
        blocks = [child for child in group if child in trace.shapes]
        shapes = {trace.shapes[block] for block in blocks}
        if len(shapes) != 1 or len({type(block) for block in blocks}) != 1:
            continue
        shape = shapes.pop()
        if len(shape) != 3 or not 0 <= shape[1] - patches <= MAX_PREFIX:
            continue
        for every_block in (False, True):
            path = TokenPath(tuple(blocks), stride, shape[1] - patches, shape[2], every_block)
            if _tokens_are_a_set(info, path, patches):
                return path
    return None


def _tokens_are_a_set(info: EncoderInfo, path: TokenPath, patches: int) -> bool:
    """Whether the blocks treat their tokens as a set: a permutation changes no output, and a subset runs.

    Windowed attention and relative position tables fail here.
    """
    images = info.probe_images()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(patches, generator=generator).to(images.device)[None]
    fill = torch.zeros(path.width, device=images.device)
    try:
        with torch.no_grad():
            plain = list(tensors(run_encoder(info.model, info.module, images)))
            with visible_tokens(path, order, patches, fill):
                permuted = list(tensors(run_encoder(info.model, info.module, images)))
            with visible_tokens(path, order[:, : max(patches // 2, 1)], patches, fill):
                subset = list(tensors(run_encoder(info.model, info.module, images)))
    except Exception:  # the blocks need all tokens in order: no token path
        return False
    if not [t.shape for t in plain] == [t.shape for t in permuted] == [t.shape for t in subset]:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item()) for a, b in zip(plain, permuted, strict=True)
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, each flag back as it was after it."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def data_config(model: nn.Module) -> dict[str, Any]:
    """The data configuration (mean, std, input_size) that timm keeps on its models; empty for other models."""
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
        if config and "mean" in config:
            return dict(config)
    return {}


def _probe_sizes(model: nn.Module, image_size: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """Sizes to try: the asked one, or a small one that is not square, then what the model says of itself."""
    if image_size is not None:
        return [(image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])]
    sizes = [(128, 160)]
    if "input_size" in (config := data_config(model)):
        sizes.append(tuple(config["input_size"][-2:]))
    for module in model.modules():
        side = getattr(module, "img_size", None) or getattr(getattr(module, "config", None), "image_size", None)
        if side:
            sizes.append((_side(side), _side(side, 1)))
    return list(dict.fromkeys([*sizes, (224, 224), (256, 256)]))


def _side(value: Any, axis: int = 0) -> int:
    return int(value if isinstance(value, int) else value[axis])


def _probe_images(model: nn.Module, size: tuple[int, int]) -> Tensor:
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, *size, generator=generator).to(like)
