"""HeadCopy: a decoder that is a copy of the model's own head."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import Features, MapSpec, tensors
from ttt_adapt.model.hooks import hooks, run_encoder


class HeadCopy(nn.Module):
    """A copy of everything behind the encoder, with a last layer that predicts pixels (the paper's decoder).

    The copy has the trained weights of the original. Only its last convolution is new: it has 3 * s * s outputs at its
    stride s, which are rearranged to pixels. What the model does after that layer (upsampling, softmax) does not run.
    Where a model has several outputs, or auxiliary heads, the copy ends in the main one: the map that most of the
    head's weights make.

    Args:
        model: the user's model; it is not changed.
        path: dotted path of the encoder, a module that holds all of it.
        images: images [1, 3, H, W] to run the model on.
        specs: the encoder's maps, finest first.

    Raises:
        EncoderError: the encoder is not one module of its own, its head needs more than what it returns, or no
            convolution follows it.
    """

    def __init__(self, model: nn.Module, path: str, images: Tensor, specs: Sequence[MapSpec]) -> None:
        super().__init__()
        if not path:
            raise EncoderError("copy_head needs a head behind the encoder, but the encoder is the whole model")
        encoder = model.get_submodule(path)
        stub = _Stub(encoder)
        head = copy.deepcopy(model, {id(encoder): stub}).requires_grad_(True)
        with torch.no_grad():
            stub.output = run_encoder(model, encoder, images)
        leaves = list(tensors(stub.output))
        covered = max(images.shape[-2], specs[0].stride * _rows(leaves[specs[0].index], specs[0]))
        last, rows = _last_convolution(head, images)
        self.stride = -(-covered // rows)
        _set_outputs(head, last, 3 * self.stride**2)
        self.head, self.path, self.last = head, path, last
        self._freeze_unused(images)
        stub.output = None

    @torch.no_grad()
    def renew(self, model: nn.Module) -> None:
        """Copy the weights of the head of `model` again, in place; the new last layer keeps its own."""
        own = self.head.state_dict()
        for name, tensor in model.state_dict().items():
            if name in own and name.rpartition(".")[0] != self.last:
                own[name].copy_(tensor)

    def detach(self) -> None:
        """Let go of the model's encoder, which the copy asks for settings; the copy does not run any more."""
        vars(self.head.get_submodule(self.path)).pop("_encoder", None)

    def _freeze_unused(self, images: Tensor) -> None:
        """Let those parameters learn that the last layer's output depends on, and freeze the others."""
        with torch.enable_grad():
            out = run_encoder(self.head, self.head.get_submodule(self.last), images)
            parameters = list(self.head.parameters())
            gradients = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def forward(self, features: Features) -> Tensor:
        """Features -> image [B, 3, h * s, w * s]."""
        stub = self.head.get_submodule(self.path)
        assert isinstance(stub, _Stub)
        stub.output = features.raw
        like = features.maps[0]
        images = like.new_zeros(1).expand(like.shape[0], 3, *features.image_size)  # the head may ask for their shape
        try:
            out = run_encoder(self.head, self.head.get_submodule(self.last), images)
        finally:
            stub.output = None
        return F.pixel_shuffle(out, self.stride)


class _Stub(nn.Module):
    """Stands in the place of the encoder in the copy, and returns features that were computed before.

    What a head reads of its encoder beside the features (settings, numbers of channels, methods that call it) it finds
    here too.

    Args:
        encoder: the encoder of the user's model. It is no module of the stub, which has no weights.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.output: Any = None
        self.__dict__["_encoder"] = encoder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_encoder" not in self.__dict__:
            raise AttributeError(name)
        encoder = self.__dict__["_encoder"]
        method = inspect.getattr_static(type(encoder), name, None)
        if isinstance(method, FunctionType):  # it may call the encoder: that is this stub
            return MethodType(method, self)
        return getattr(encoder, name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return _fresh(self.output)


def _fresh(value: Any) -> Any:
    """The same tensors in lists, tuples and dicts of their own, which a head may change."""
    if isinstance(value, list):
        fresh: Any = copy.copy(value)
        fresh[:] = [_fresh(item) for item in value]
        return fresh
    if isinstance(value, dict):
        fresh = copy.copy(value)
        for key, item in value.items():
            fresh[key] = _fresh(item)
        return fresh
    return tuple(_fresh(item) for item in value) if type(value) is tuple else value


def _rows(tensor: Tensor, spec: MapSpec) -> int:
    """Rows of the map in a tensor; 0 where it comes as tokens."""
    axis = {"nchw": 2, "nhwc": 1}.get(spec.layout)
    return 0 if axis is None else tensor.shape[axis]


def _last_convolution(head: nn.Module, images: Tensor) -> tuple[str, int]:
    """Name and number of output rows of the last Conv2d that the main output of `head(images)` depends on.

    Raises:
        EncoderError: a convolution runs before the encoder, none behind it gives a map, or the head runs more of the
            encoder than its end.
    """
    ran: list[tuple[str, Tensor]] = []

    def record(name: str) -> Any:
        return lambda _module, _args, output: ran.append((name, output))

    before: list[str] | None = None

    def reached(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal before
        before = [name for name, _ in ran] if before is None else before

    stubs = [m for m in head.modules() if isinstance(m, _Stub)]
    handles = [m.register_forward_hook(record(n)) for n, m in head.named_modules() if isinstance(m, nn.Conv2d)]
    handles += [stub.register_forward_hook(reached) for stub in stubs]
    with _without_encoder(stubs[0]), hooks(handles), torch.enable_grad():
        output = head(images)
    if before:
        raise EncoderError(
            f"copy_head needs an encoder that is one module: {before[0]!r} runs before the module that was named, so "
            'it would be copied with the head; name a module that holds all of the encoder, or use decoder="conv"'
        )
    of_main = _of_main_output(ran, list(tensors(output)), list(head.parameters()))
    last = next((name for name, _ in reversed(of_main)), "")
    shape = next((made.shape for name, made in ran if name == last), torch.Size([1]))  # of its first call
    if 1 in shape[-2:]:
        raise EncoderError(
            "copy_head needs a head that ends in a convolution over a map, as segmentation heads do; "
            'this model has none behind its encoder: use decoder="conv"'
        )
    return last, shape[-2]


@contextmanager
def _without_encoder(stub: _Stub) -> Iterator[None]:
    """Inside the block, a head that calls parts of the encoder, or lacks something of it, is refused.

    Raises:
        EncoderError: it does, or it fails.
    """
    encoder: nn.Module = stub.__dict__["_encoder"]
    called: list[str] = []
    handles = [
        m.register_forward_pre_hook(lambda _m, _a, name=n: called.append(name)) for n, m in encoder.named_modules()
    ]
    reason = ""
    try:
        with hooks(handles):
            yield
    except EncoderError:
        raise
    except Exception as error:
        reason = f"it fails with {type(error).__name__}: {error}"
    if called:
        reason = f"it runs {called[0] or 'the encoder'!r} of the encoder, too"
    if reason:
        raise EncoderError(
            "copy_head needs a head that runs on what the encoder returns; the head of this model does not: "
            f'{reason}. Use decoder="conv", or name another module as the end of the encoder'
        )


def _of_main_output(
    ran: list[tuple[str, Tensor]], outputs: list[Tensor], parameters: list[nn.Parameter]
) -> list[tuple[str, Tensor]]:
    """Of the convolutions that ran, those that the main output depends on; all where no output has a gradient.

    The main output is the map [B, C, h, w], or else the tensor, that depends on the most weights.
    """
    outputs = [x for x in outputs if x.requires_grad]
    maps = [x for x in outputs if x.ndim == 4 and 1 not in x.shape[-2:]] or outputs
    if not maps:
        return ran
    made = [x for _, x in ran]

    def depends(output: Tensor, on: Sequence[Tensor]) -> list[bool]:
        gradients = torch.autograd.grad(output.sum(), on, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    def weights(output: Tensor) -> int:
        return sum(p.numel() for p, used in zip(parameters, depends(output, parameters), strict=True) if used)

    main = max(maps, key=weights)
    return [call for call, used in zip(ran, depends(main, made), strict=True) if used] if made else ran


def _set_outputs(head: nn.Module, name: str, channels: int) -> None:
    """Replace the convolution `name` by a new one with `channels` outputs."""
    old = head.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    kernel, stride, padding, dilation = old.kernel_size, old.stride, old.padding, old.dilation
    new = nn.Conv2d(old.in_channels, channels, kernel, stride, padding, dilation).to(old.weight)  # type: ignore[arg-type]
    parent, _, leaf = name.rpartition(".")
    setattr(head.get_submodule(parent), leaf, new)
