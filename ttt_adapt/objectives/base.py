"""What a label-free objective is, and two base classes to write one with.

An objective has to follow the protocol `Objective`; `StatefulObjective` and `SplitLoss` are optional additions to it.
Nothing has to be inherited, but a base class saves work:

- `Attached`: for objectives with layers of their own on top of the model's encoder (`MAEBranch`, `Rotation`).
- `OutputObjective`: for objectives on the model's own predictions (`Entropy`, `PseudoLabel`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError, FrameError, StateError
from ttt_adapt.model.encoder import EncoderInfo
from ttt_adapt.model.half import in_float32
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.probe import evaluating


@runtime_checkable
class Objective(Protocol):
    """Anything with trainable parameters and a label-free loss on frames; `MAEBranch` is one.

    `StreamAdapter` uses the members below. It also uses those of `StatefulObjective` and `SplitLoss` if they exist.
    """

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        ...

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The loss, a scalar with its graph, of images [B, 3, H, W] as the model takes them."""
        ...

    def encoder_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name in the user's model -> parameter of the model that the loss adapts."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the objective itself, outside the user's model."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the objective's own modules to training or evaluation mode."""
        ...

    def detach(self) -> None:
        """Let go of the model; may be called twice."""
        ...


@runtime_checkable
class StatefulObjective(Protocol):
    """Additional members of an `Objective` with tensors that change during a stream beside the trained parameters."""

    def memory(self) -> Mapping[str, Tensor]:
        """Name -> such a tensor. The adapter saves these with the stream and restores them at a reset and a detach."""
        ...

    def after_step(self) -> None:
        """Called after every gradient step, without gradients."""
        ...


@runtime_checkable
class SplitLoss(Protocol):
    """Additional members of an `Objective` that can draw its random numbers before the loss.

    `loss(images)` equals `loss_of(images, draw(images))`.
    """

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw everything that is random in the loss of `images`: a tensor [B, ...]."""
        ...

    def loss_of(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The loss for these draws. Nothing else in it is random, and it reads no value back from the device."""
        ...

    def weight(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The number that the loss divides by, a scalar.

        The loss of a batch is the mean of the losses of its parts, weighted by this number.
        """
        ...

    def settings(self) -> Hashable:
        """What the loss depends on beside images, draws and weights."""
        ...


Self = TypeVar("Self", bound="Attached")
Attach = TypeVar("Attach", bound=Callable[..., Any])


def examines(attach: Attach) -> Attach:
    """For `attach(cls, model, ...)` of an `Attached`: it runs the model, and leaves it as it is.

    What passes change in the model stays as it is. A model in half precision is examined in float32.
    """

    @wraps(attach)
    def run(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return attach(cls, model, *args, **kwargs)
        like = next(model.parameters(), torch.empty(0, device="cpu"))
        state = PassState(model)
        with torch.device(like.device), in_float32(model), evaluating(model), state.kept():
            objective = attach(cls, model, *args, **kwargs)
        objective.pass_state = state
        objective.follow_model()
        objective.note_draws()
        return objective

    return run  # type: ignore[return-value]


class Attached(nn.Module):
    """Base class for objectives with layers of their own on top of the encoder of the user's model.

    These layers are modules of the objective; nothing is added to the model. A subclass implements `loss`.

    Attributes:
        pass_state: what the model's passes change in it beside its parameters; passes of the objective leave it alone.

    Args:
        info: the encoder, as `inspect_encoder` found it.
    """

    def __init__(self, info: EncoderInfo) -> None:
        super().__init__()
        self._info: EncoderInfo | None = info
        self.pass_state = PassState(info.model)
        self._drawn: list[float] | None = None
        self._keeps_norms = False
        self._norms: list[nn.Module] | None = None

    @property
    def info(self) -> EncoderInfo:
        """The encoder that this objective is attached to.

        Raises:
            StateError: the objective was detached.
        """
        if self._info is None:
            name = type(self).__name__
            raise StateError(
                f"this branch is detached: attach a new one with new = {name}.attach(model, ...), and give it this "
                "one's weights with new.load_state_dict(branch.state_dict())"
            )
        return self._info

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.info.model

    @property
    def untrained(self) -> bool:
        """Whether all layers of the objective's own are still as they were drawn when it was attached."""
        return self._drawn is not None and self._numbers() == self._drawn

    def note_draws(self) -> None:
        """Take the objective's own layers as drawn, and not trained or loaded."""
        self._drawn = self._numbers()

    def _numbers(self) -> list[float]:
        """Sums of all parameters of the objective's own."""
        return [float(p.detach().double().sum()) for p in self.parameters()]

    def follow_model(self) -> None:
        """Move the objective's own layers to the device and dtype of the encoder, where it was moved."""
        like, own = next(iter(self.info.parameters.values())), next(self.parameters(), None)
        if isinstance(own, nn.Parameter) and (own.device, own.dtype) != (like.device, like.dtype):
            self.to(like)

    def encoder_parameters(self) -> dict[str, nn.Parameter]:
        """Name in the model -> parameter, for all parameters that the encoder's features depend on."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self.info.parameters}

    @property
    def norms(self) -> list[nn.Module]:
        """The layers with running statistics that an encoder pass may change.

        In evaluation mode the list is made once and kept: to make it takes a walk over all modules, and during a
        stream the layers stay the same. In training mode it is made at each call.
        """
        if self.training or not self._keeps_norms:
            return self.info.norms
        if self._norms is None:
            self._norms = self.info.norms
        return self._norms

    def train(self: Self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`."""
        self._keeps_norms, self._norms = not mode, None
        return super().train(mode)

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The label-free loss, a scalar with its graph, of images [B, 3, H, W] as the model takes them."""
        raise NotImplementedError

    def checked(self, images: Tensor) -> Tensor:
        """Return `images` as they are.

        Raises:
            FrameError: they are not float images [B, 3, H, W].
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise FrameError(f"got {got}; expected float images [B, 3, H, W], normalised as the model takes them")
        return images

    def detach(self) -> None:
        """Let go of the model and keep the weights of the objective's own layers.

        Nothing has to be undone on the model. May be called twice.
        """
        self._info = self._norms = None
        self.pass_state = PassState(nn.Module())

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


class OutputObjective:
    """Base class for objectives on the model's predictions. They have no parameters outside of the model.

    A subclass implements `loss`.

    Args:
        model: the user's model.
        parameters: name in the model -> parameter to train.
        logits: makes class scores [B, C, ...] of the model's output; by default the output is taken as it is.

    Raises:
        ConfigError: `parameters` is empty.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], logits: Callable[[Any], Tensor] | None = None
    ) -> None:
        if not parameters:
            raise ConfigError(f"{type(model).__name__} has no parameters that {type(self).__name__} could adapt")
        self._model, self._parameters, self._logits = model, dict(parameters), logits

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._model

    def encoder_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name in the model -> parameter that is trained."""
        return self._parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: all trained parameters belong to the model."""
        return iter(())

    def train(self, mode: bool = True) -> Any:
        """Do nothing: there are no modules beside the model's."""
        return self

    def detach(self) -> None:
        """Do nothing: nothing was added to the model."""

    def scores(self, output: Any) -> Tensor:
        """The model's output as class scores [B, C, ...].

        Raises:
            ConfigError: the output is not a tensor of class scores, and `logits` does not make it one.
        """
        found = output if self._logits is None else self._logits(output)
        if not isinstance(found, Tensor) or found.ndim < 2 or found.shape[1] < 2:
            got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{type(self).__name__} needs class scores [B, C, ...] and got {got}: pass logits=, a function that "
                "makes them of the model's output"
            )
        return found
