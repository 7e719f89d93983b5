"""LowRank: a stream adapts matrices by the product of two small factors, and holds these alone.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022. The product is added to the model's
own weights: a prediction costs nothing more, and nothing is put into the model. The gradients of the factors are made
of that of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.half import HALF


class LowRank:
    """W = W_source + up @ down, for each of some weights W [out, in, ...].

    `up` [out, r] begins with zeros, so a stream begins with the source, bit for bit. `down` [r, in] begins with uniform
    draws of at most 1 / sqrt(in), as the weights of linear layers do.

    Attributes:
        factors: name -> factor, in the order `down`, `up` for each weight.

    Args:
        weights: name -> weight.
        rank: of the product, r; at most that of the weight.
        seed: of the draws. They are the same on every device.

    Raises:
        ConfigError: a weight is in half precision.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weights: Mapping[str, nn.Parameter], rank: int, seed: int) -> None:
        if halves := [name for name, p in weights.items() if p.dtype in HALF]:
            raise ConfigError(
                f"adapt is 'lora:{rank}', and {halves[0]} is in half precision, where small changes of a weight are "
                "lost: convert the model with model.float(), or adapt another part"
            )
        self._weights: list[Tensor] = list(weights.values())
        self._sources = [p.detach().clone() for p in self._weights]
        self.factors: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, source in zip(weights, self._sources, strict=True):
            rows, columns = source.flatten(1).shape
            r = min(rank, rows, columns)
            drawn = (torch.rand(r, columns, generator=generator) * 2.0 - 1.0) / columns**0.5
            self.factors[f"{name}.down"] = nn.Parameter(drawn.to(source))
            self.factors[f"{name}.up"] = nn.Parameter(source.new_zeros(rows, r))

    @property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(down, up) of each weight."""
        factors = list(self.factors.values())
        return list(zip(factors[::2], factors[1::2], strict=True))

    @torch.no_grad()
    def derive(self) -> None:
        """Write the weights anew, from the factors."""
        for weight, source, (down, up) in zip(self._weights, self._sources, self._pairs, strict=True):
            weight.copy_(torch.addmm(source.flatten(1), up, down).view_as(weight))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the source weights, bit for bit."""
        torch._foreach_copy_(self._weights, self._sources)

    def originals(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """`tensors` with the source weights in the place of those of the model."""
        sources = {id(weight): source for weight, source in zip(self._weights, self._sources, strict=True)}
        return {name: sources.get(id(tensor), tensor) for name, tensor in tensors.items()}

    def release(self) -> None:
        """Let go of the model and of the source weights."""
        self._weights, self._sources = [], []
        self.factors = {}

    @torch.no_grad()
    def gradients(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the factors.

        Args:
            found: those of the weights, as far as a loss reaches them.
        """
        result: list[Tensor | None] = []
        for gradient, (down, up) in zip(found, self._pairs, strict=True):
            if gradient is None:
                result += [None, None]
            else:
                flat = gradient.flatten(1)
                result += [up.T @ flat, flat @ down.T]
        return result
