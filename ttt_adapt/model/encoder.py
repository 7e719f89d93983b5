"""Examine a model once and find what adaptation needs: its encoder, features, first convolution and parameters.

Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError, FeatureMapError, nearest
from ttt_adapt.model.features import TOKEN_AXES, MapSpec, tensors
from ttt_adapt.model.find_encoder import encoder_paths, outermost
from ttt_adapt.model.grid import find_maps
from ttt_adapt.model.hooks import (
    CHECKPOINT_FLAGS,
    TokenPath,
    hooks,
    run_encoder,
    uncompiled,
    without_checkpointing,
)
from ttt_adapt.model.map_choice import choose_maps, learning
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.model.pass_state import undone_if_it_fails
from ttt_adapt.model.probe import along, evaluating, other_sizes, probe_images, probe_sizes
from ttt_adapt.model.refusal import why_not
from ttt_adapt.model.stem import find_stem
from ttt_adapt.model.token_dropout import token_droppers
from ttt_adapt.model.token_path import find_token_path
from ttt_adapt.model.trace import Trace

TRIED = 6
"""How many modules are tried at most where nobody named the encoder."""
MAX_PADDING = 64
"""A model whose first convolution sees an image so many pixels larger, or more, resizes it rather than padding it."""


@dataclass(frozen=True)
class EncoderInfo:
    """An encoder, as `inspect_encoder` found it.

    Attributes:
        model: the user's model.
        path: dotted path of the module where the encoder ends ("" is the model itself).
        module: that module.
        alternatives: other paths at which the encoder might end; empty where the caller named it.
        stem: the first convolution that sees the images, or else the first layer that returns a map over them; None
            where there is none.
        stem_path: its dotted path.
        stem_map: the map that the stem returns; None where it is a convolution over the images themselves.
        maps: the encoder's feature maps, finest first.
        parameters: name -> parameter, all that the features depend on.
        checkpointing: modules that can recompute their activations in the backward pass.
        tokens: the blocks that tokens run through, for plain transformers; None for every other encoder.
        no_tokens: why there are none; "" if there are.
        token_droppers: modules that leave out tokens in training mode.
        probe_size: (H, W) of the random images that the model was examined with.
        called_norms: dotted path -> layer with running statistics, for all that an encoder pass calls.
    """

    model: nn.Module = field(repr=False)
    path: str
    module: nn.Module = field(repr=False)
    alternatives: tuple[str, ...] = field(repr=False)
    stem: nn.Module | None = field(repr=False)
    stem_path: str
    stem_map: MapSpec | None = field(repr=False)
    maps: list[MapSpec]
    parameters: dict[str, nn.Parameter] = field(repr=False)
    checkpointing: list[nn.Module] = field(repr=False)
    tokens: TokenPath | None = field(repr=False)
    no_tokens: str = field(repr=False)
    token_droppers: list[nn.Module] = field(repr=False)
    probe_size: tuple[int, int]
    called_norms: dict[str, nn.Module] = field(repr=False)

    @property
    def norms(self) -> list[nn.Module]:
        """The layers with running statistics that an encoder pass may change, looked up now.

        They may be others than at the time of attaching: distributed training replaces such layers.
        """
        adapted = {id(p) for p in self.parameters.values()}
        now = dict(self.model.named_modules(remove_duplicate=False))
        called = {*self.called_norms.values(), *(now[path] for path in self.called_norms if path in now)}
        norms = norm_layers(self.model)
        return [n for n in norms if n in called or any(id(p) in adapted for p in n.parameters())]

    def probe_images(self) -> Tensor:
        """Fixed random images [1, 3, H, W] of `probe_size`, on the model's device."""
        return probe_images(self.model, self.probe_size)


def inspect_encoder(
    model: nn.Module, encoder: str | nn.Module = "auto", image_size: int | tuple[int, int] | None = None
) -> EncoderInfo:
    """Find what adaptation needs in `model`, by running it on random images.

    Args:
        model: any module that takes images [B, 3, H, W].
        encoder: dotted path of the module where the encoder ends, or the module; "auto" finds it.
        image_size: (H, W) or side of the random images; by default several sizes are tried.

    Raises:
        EncoderError: unknown path, an encoder that is never reached, features of unknown layout, or nothing to adapt.
    """
    if not isinstance(model, nn.Module):
        raise EncoderError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    named = None if isinstance(encoder, str) and encoder == "auto" else _find_encoder(model, encoder)
    if not any(True for _ in model.parameters()):
        raise EncoderError(f"{type(model).__name__} has no parameters: there is nothing to adapt")
    if any(p.is_inference() for p in model.parameters()):
        raise EncoderError("the model was made under torch.inference_mode() and cannot learn: make it outside of it")
    failures, without_map = [], None
    for size in probe_sizes(model, image_size):
        with evaluating(model), torch.inference_mode(False), uncompiled(), without_checkpointing(_checkpointing(model)):
            try:
                with undone_if_it_fails(model):  # models such as Swin fit themselves to a size, also where that fails
                    return _inspect(model, named, size)
            except FeatureMapError as error:  # a size that the model names may show a map where this one does not
                without_map = without_map or error
            except EncoderError:
                raise
            except Exception as error:  # the model does not take this size: try the next one
                failures.append(f"{size[0]} x {size[1]}: {type(error).__name__}: {error}")
    if without_map is not None:
        raise without_map
    tried = f"tried {'; '.join(failures)}"
    with evaluating(model), torch.inference_mode(False):
        if reason := why_not(model, probe_sizes(model, image_size)):
            raise EncoderError(f"{reason}. Its own errors: {tried}")
    raise EncoderError(
        f"the model could not be run on random images to find its encoder's features; {tried}. "
        "Pass image_size=(H, W) with a size that it takes"
    )


def _find_encoder(model: nn.Module, encoder: str | nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the encoder that the user named."""
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


def _inspect(model: nn.Module, named: tuple[str, nn.Module] | None, size: tuple[int, int]) -> EncoderInfo:
    """Examine the model with images of one size (H, W); without an encoder that was `named`, find it."""
    size = _own_size(model, named, size)
    if named is not None:
        return _examine(model, *named, size)
    modules = dict(model.named_modules())
    paths = encoder_paths(model, probe_images(model, size), other_sizes(size))
    failure: EncoderError = FeatureMapError(
        f"no module of {type(model).__name__} was found on which all outputs depend and whose output is a map over the "
        f'image, for images of {size[0]} x {size[1]}: name the encoder, encoder="..."'
    )
    for path in paths[:TRIED]:
        try:
            info = _examine(model, path, modules[path], size)
            inside = [other for other in paths if other.startswith(f"{path}." if path else "") and other != path]
            others = outermost([other for other in paths if other not in inside and other != path])
            return replace(info, alternatives=(*others, *outermost(inside)))
        except EncoderError as error:
            failure = failure if path != paths[0] else error
    raise failure


def _own_size(model: nn.Module, named: tuple[str, nn.Module] | None, size: tuple[int, int]) -> tuple[int, int]:
    """A size (H, W) near `size` which the model neither resizes nor pads inside, where there is one.

    Padding hides the layout of tokens, and a model that resizes cannot be told which pixels are hidden.
    """
    trace = _trace(model, named, size)
    if trace.stem is None:
        return size
    seen = (trace.stem_inputs[0][-2], trace.stem_inputs[0][-1])
    if not _padded(size, seen):
        try:
            again = _trace(model, named, seen)
        except Exception:  # what the stem sees is a part of the image, and too small for the model
            return size
        return seen if again.stem is trace.stem and again.stem_inputs[0][-2:] == seen else size
    stride = along(trace.stem.stride)
    return (size[0] - size[0] % stride, size[1] - size[1] % stride) if stride > 2 and min(size) >= stride else size


def _padded(size: tuple[int, int], seen: tuple[int, int]) -> bool:
    """Whether a first convolution that sees `seen` (H, W) of images of `size` sees them as they are, or padded."""
    return all(0 <= inner - side < MAX_PADDING for inner, side in zip(seen, size, strict=True))


def _not_resized(
    model: nn.Module, named: tuple[str, nn.Module], trace: Trace, sizes: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Of these sizes (H, W), first those that the model does not resize inside, then the others.

    A map of resized images does not tell how many pixels a cell covers.
    """
    resized = []
    for size in sizes:
        try:
            inputs = _trace(model, named, size).stem_inputs if trace.stem is not None else []
        except Exception:  # the model does not take this size
            continue
        if not inputs or _padded(size, (inputs[0][-2], inputs[0][-1])):
            yield size
        else:
            resized.append(size)
    yield from resized


def _trace(model: nn.Module, named: tuple[str, nn.Module] | None, size: tuple[int, int]) -> Trace:
    """What runs in a pass over images of one size (H, W): up to the encoder's end, or all of it."""
    images = probe_images(model, size)  # [1, 3, H, W]
    module = None if named is None else _called(model, *named, images)
    with torch.no_grad(), Trace(model, images) as trace:
        model(images) if module is None else run_encoder(model, module, images)
    return trace


def _examine(model: nn.Module, path: str, module: nn.Module, size: tuple[int, int]) -> EncoderInfo:
    """Examine the model with images of one size (H, W), with the encoder that ends at `module`."""
    images = probe_images(model, size)  # [1, 3, H, W]
    module = _called(model, path, module, images)
    trace = _trace(model, (path, module), size)
    with torch.no_grad():
        others = _not_resized(model, (path, module), trace, other_sizes(size))
        run = partial(run_encoder, model, module)
        maps = choose_maps(model, run, images, find_maps(run, images, others))
    stem: tuple[str, nn.Module, MapSpec | None] | None = None
    stem = find_stem(model, module, images) if trace.stem is None else (trace.stem_path, trace.stem, None)
    norms = {name: m for name, m in model.named_modules(remove_duplicate=False) if m in trace.norms}
    side = next((spec.stride for spec in maps if spec.layout in TOKEN_AXES), None)
    stride = side if side is not None or trace.stem is None else along(trace.stem.stride)
    tokens, no_tokens = find_token_path(model, module, trace, size, stride)
    return EncoderInfo(
        model=model,
        path=path,
        module=module,
        alternatives=(),
        stem=None if stem is None else stem[1],
        stem_path="" if stem is None else stem[0],
        stem_map=None if stem is None else stem[2],
        maps=maps,
        parameters=_used_parameters(model, module, images, maps),
        checkpointing=_checkpointing(model),
        tokens=tokens,
        no_tokens=no_tokens,
        token_droppers=token_droppers(model, module, images),
        probe_size=size,
        called_norms=norms,
    )


def _called(model: nn.Module, path: str, module: nn.Module, images: Tensor) -> nn.Module:
    """The module whose call ends the encoder: `module`, or its last child if the model loops over a list instead."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
        return module
    ran: list[nn.Module] = []
    candidates = [module, *(child for child in module if child is not None)]
    with hooks(m.register_forward_hook(lambda m, _a, _o: ran.append(m)) for m in candidates), torch.no_grad():
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
    """Name -> parameter, for those with a gradient from the feature maps. Frozen parameters count too."""
    named = dict(model.named_parameters())
    with learning(model):
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
    return {name: p for (name, p), g in zip(named.items(), gradients, strict=True) if g is not None}


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    """The modules that can recompute their activations."""
    return [m for m in model.modules() if any(hasattr(m, flag) for flag in CHECKPOINT_FLAGS)]
