"""What adaptation changes in a model, and where its values are while another video has the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttt_adapt.errors import StateError
from ttt_adapt.model.parameters import check_state
from ttt_adapt.objectives.base import Objective, StatefulObjective
from ttt_adapt.stream.source import SourceWeights
from ttt_adapt.stream.state_part import Part


class AdaptedTensors(NamedTuple):
    """The tensors that adaptation changes, by name.

    Attributes:
        weights: of the encoder and of the objective; gradient steps change them.
        statistics: running statistics of BatchNorm that follow the video.
        memory: what the objective remembers.
    """

    weights: dict[str, Tensor]
    statistics: dict[str, Tensor]
    memory: dict[str, Tensor]

    @property
    def everything(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**self.weights, **self.statistics, **self.memory}


def adapted_tensors(
    objective: Objective,
    encoder: Mapping[str, nn.Parameter],
    own: Mapping[str, nn.Parameter],
    norms: Sequence[nn.Module],
    copies: Mapping[str, Tensor] | None = None,
) -> AdaptedTensors:
    """Everything that adaptation changes.

    Args:
        objective: with what it remembers, if it is a `StatefulObjective`.
        encoder: name -> parameter of the user's model.
        own: name -> parameter of the objective's own.
        norms: layers whose running statistics move.
        copies: name -> float32 copy of a weight in half precision, by the names of `named_weights`.
    """
    weights: dict[str, Tensor] = {**named_weights(encoder, own)}
    weights |= {f"float32.{name}": copy for name, copy in (copies or {}).items()}
    buffers = [(f"norm.{i}.{name}", buffer) for i, norm in enumerate(norms) for name, buffer in norm.named_buffers()]
    memory = objective.memory() if isinstance(objective, StatefulObjective) else {}
    return AdaptedTensors(weights, dict(buffers), {f"memory.{name}": tensor for name, tensor in memory.items()})


def named_weights(encoder: Mapping[str, nn.Parameter], own: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weights of encoder and objective under the names that a saved stream has for them."""
    return {f"model.{name}": p for name, p in encoder.items()} | {f"branch.{name}": p for name, p in own.items()}


class AdaptedWeights(Part):
    """The tensors that adaptation changes: weights, running statistics, and what an objective remembers.

    Of several videos over one model, the values of one are in the model. Those of the others are in copies, as far as
    they differ from the source: a video at its beginning needs none.

    Args:
        live: name -> tensor of the model or of its branch. They are written in place: their addresses stay.
        source: their values before adaptation.
        undone: names of the tensors that a failed step may leave half changed.

    Attributes:
        moved: whether they may differ from the source; who changes them sets it.
    """

    def __init__(self, live: Mapping[str, Tensor], source: SourceWeights, undone: Sequence[str] = ()) -> None:
        self._names, self._live, self._source = list(live), list(live.values()), source
        self._undone = [live[name] for name in undone]
        self._present = True
        self._parked: list[Tensor] = []
        self.moved = False

    @property
    def _values(self) -> Sequence[Tensor]:
        """Where the values are now: in the model, in copies, or with the source."""
        return self._live if self._present else self._parked or self._source.values

    @property
    def inside(self) -> bool:
        """Whether the values are in the model."""
        return self._present

    def shares_model_with(self, other: AdaptedWeights) -> bool:
        """Whether both are of the same adapter."""
        return self._source is other._source

    def pull(self, fraction: float) -> None:
        """Move the weights `fraction` of the way back to the source weights; 1 restores everything.

        Raises:
            StateError: the values of this video are not in the model.
        """
        self._check_inside()
        self._source.pull(fraction)
        self.moved = self.moved and fraction < 1.0

    def distance(self) -> Tensor:
        """How far the weights are from the source, in parts of the norm of the source: a scalar on their device."""
        return self._source.distance()

    def release(self) -> None:
        """Let go of the model: it was given back. What is called after this raises a StateError."""
        self._source.release()

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self) -> None:
        """Move the values out of the model, into copies; nothing is copied that is as in the source.

        Raises:
            StateError: they are not in the model.
        """
        self._check_inside()
        copies = self._copies() if self.moved else []
        if copies:  # a stream without an objective changes nothing
            torch._foreach_copy_(copies, self._live)
        self._parked, self._present = copies, False

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self) -> None:
        """Move the values into the model."""
        self._source.check()
        if not self._present:
            if self._parked:
                torch._foreach_copy_(self._live, self._parked)
                self._source.derive()
            else:
                self._source.restore()
            self._present = True
            torch.clear_autocast_cache()

    def place(self) -> Callable[[], None]:
        """Remember whether the values are in the model.

        Returns:
            A function that brings them back there, or calls those in the copies the valid ones again.
        """
        return self.enter if self._present else self._stay_out

    def _stay_out(self) -> None:
        self._present = False

    def _check_inside(self) -> None:
        if not self._present:
            raise StateError("this video is not in the model: swap(state) puts it in")

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Inside the block the model has its source weights; then it has those of this video again."""
        if not self.moved:
            yield
            return
        try:
            self.leave()
            self._source.restore()
            torch.clear_autocast_cache()
            yield
        finally:
            self.enter()

    def reset(self) -> None:
        """Go back to the source weights."""
        self._source.check()
        if self._present:
            self._source.restore()
        self._parked, self.moved = [], False
        torch.clear_autocast_cache()

    def free(self) -> None:
        """See `Part`."""
        self._parked = []

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every tensor, by name."""
        return {name: tensor.detach().clone() for name, tensor in zip(self._names, self._values, strict=True)}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        self._source.check()
        check_state(dict(zip(self._names, self._values, strict=True)), saved, "this adapter's model", finite=True)
        values = [saved[name].detach() for name in self._names]
        present, places = self._present, self._live if self._present else self._copies()

        def load() -> None:
            self.moved = True
            if values:
                torch._foreach_copy_(places, values)
            if present:
                self._source.derive()
                torch.clear_autocast_cache()
            else:
                self._parked = places

        return load

    def mark(self) -> Callable[[], None]:
        """See `Part`; weights stay as the last finished gradient step left them, statistics are put back."""
        before = [tensor.clone() for tensor in self._undone]

        def undo() -> None:
            for live, kept in zip(self._undone, before, strict=True):
                live.copy_(kept)

        return undo

    def _copies(self) -> list[Tensor]:
        """Memory for the values of a video that is not in the model."""
        return self._parked or [torch.empty_like(tensor, requires_grad=False) for tensor in self._live]
