"""Runners that see one frame after the other: the fixed model, re-estimated statistics, adaptation by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.adapter import StreamAdapter
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.calibration import Calibration, settled_config
from ttt_adapt.model.frames import Preprocess, to_model_input
from ttt_adapt.model.hooks import hooks
from ttt_adapt.model.norms import blended_statistics, norm_layers, updating_norms
from ttt_adapt.model.parameters import check_state
from ttt_adapt.objectives import Objective
from ttt_adapt.stream.source import SourceWeights


class Fixed:
    """The model as trained."""

    loss: float | None = None

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        self.model, self.preprocess = model, preprocess

    def take(self, frame: Any) -> Tensor:
        """A frame as the model takes it, [1, 3, H, W]."""
        return to_model_input(frame, self.preprocess, next(self.model.parameters()).device)

    def step(self, frame: Any) -> Tensor:
        """Predict, nothing else."""
        return self.predict(self.take(frame))

    def predict(self, x: Tensor) -> Tensor:
        """The model's class scores for images [1, 3, H, W]."""
        with torch.no_grad():
            return self.model(x)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it has no memory of the stream."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """Nothing to undo."""


class NormAverage(Fixed):
    """BatchNorm whose running statistics are a moving average over the stream; no gradient.

    A pass in training mode updates the running statistics, as PyTorch does in training. A second pass predicts with
    them.

    Args:
        model: a model with BatchNorm.
        preprocess: frame -> model input.
        momentum: weight of the current frame.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, momentum: float) -> None:
        super().__init__(model, preprocess)
        self._norms, self._momentum = norm_layers(model), momentum
        self._buffers = {f"{i}.{n}": b for i, m in enumerate(self._norms) for n, b in m.named_buffers()}
        self._source = SourceWeights(self._buffers)

    def step(self, frame: Any) -> Tensor:
        """Update the statistics with the frame, then predict with them."""
        with updating_norms(self._norms, self._momentum):
            super().step(frame)
        return super().step(frame)

    def state_dict(self) -> dict[str, Any]:
        """The running statistics."""
        return {name: buffer.detach().clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put the running statistics back."""
        check_state(self._buffers, saved, "this model's running statistics")
        for name, buffer in self._buffers.items():
            buffer.copy_(saved[name])

    def close(self) -> None:
        """Restore the source statistics."""
        self._source.restore()


class NormBlend(Fixed):
    """BatchNorm with a blend of its source statistics and those of the current frame, no gradient.

    Formula and source: `ttt_adapt.model.norms.blended_statistics`.

    Args:
        model: a model with BatchNorm.
        preprocess: frame -> model input.
        share: weight of the current frame.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, share: float) -> None:
        super().__init__(model, preprocess)
        self._share, self._norms = share, norm_layers(model)

    def predict(self, x: Tensor) -> Tensor:
        """Class scores by the blend of the source statistics with those of x."""
        with blended_statistics(self._norms, self._share):
            return super().predict(x)


_PLAIN_LAYER_NORMS = {"LayerNorm", "LayerNorm2d"}
"""The LayerNorms of PyTorch and timm that only normalise: over the last axis, or over C of [B, C, H, W]."""


class LayerStatistics(Fixed):
    """LN Adapt: LayerNorm with statistics that are partly those of the stream so far, no gradient.

    "Test-Time Training on Video Streams", appendix A.2, accumulates statistics with a forward pass on each frame, as is
    done for BatchNorm, and changes no trainable parameter. It gives no formula, and LayerNorm has no running statistics
    to accumulate: it normalises each token by the token's own. Here every layer keeps a moving average of the mean and
    variance of its tokens over the stream, and normalises each token by a blend,
    `(1 - share) * its own + share * the average`. With `share` 0 this is the model as trained.

    Args:
        model: a model with LayerNorm.
        preprocess: frame -> model input.
        momentum: weight of the current frame in the average; the first frame begins it.
        share: weight of the average in the blend.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, momentum: float, share: float) -> None:
        super().__init__(model, preprocess)
        self._norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        if strange := {type(m).__name__ for m in self._norms} - _PLAIN_LAYER_NORMS:
            raise ConfigError(
                f"LN Adapt computes the output of a LayerNorm anew, and {', '.join(sorted(strange))} of this model may "
                f"do more than normalise: it applies to {', '.join(sorted(_PLAIN_LAYER_NORMS))}"
            )
        self._momentum, self._share = momentum, share
        self._average: dict[nn.Module, Tensor] = {}

    def step(self, frame: Any) -> Tensor:
        """Predict in one pass; each layer updates its average before it uses it."""
        return self._run(self.take(frame), self._momentum)

    def predict(self, x: Tensor) -> Tensor:
        """Class scores with the averages as they are."""
        return self._run(x, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The averages of the layers that have any, by number."""
        return {str(i): self._average[norm].clone() for i, norm in enumerate(self._norms) if norm in self._average}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put the averages back."""
        device = next(self.model.parameters()).device
        self._average = {self._norms[int(i)]: average.to(device) for i, average in saved.items()}

    def _run(self, x: Tensor, momentum: float) -> Tensor:
        with hooks(norm.register_forward_hook(self._renormalise(momentum)) for norm in self._norms):
            return super().predict(x)

    def _renormalise(self, momentum: float) -> Callable[..., Tensor]:
        """A hook that computes the output of a layer anew, with blended statistics."""

        def redo(norm: Any, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = args[0]
            channels_first = type(norm).__name__.endswith("2d")  # one token per pixel
            x = x.movedim(1, -1) if channels_first else x
            dims = tuple(range(-len(norm.normalized_shape), 0))
            variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
            now = torch.stack([mean.mean(), variance.mean()])
            average = self._average.get(norm)
            average = now if average is None else average.lerp(now, momentum)
            if momentum:
                self._average[norm] = average
            mean, variance = mean.lerp(average[0], self._share), variance.lerp(average[1], self._share)
            y = (x - mean) * (variance + norm.eps).rsqrt()
            y = y if norm.weight is None else y * norm.weight
            y = y if norm.bias is None else y + norm.bias
            return y.movedim(-1, 1) if channels_first else y

        return redo


class Adapting:
    """Test-time training through `StreamAdapter`, with any objective.

    Args:
        objective: the label-free loss, on the model that is run.
        preprocess: frame -> model input.
        config: how the stream is adapted to.
        predict: how the model is called on images [1, 3, H, W]; the model itself by default.
        calibration: of the model; by default the objective's.
    """

    def __init__(
        self,
        objective: Objective,
        preprocess: Preprocess,
        config: StreamConfig,
        predict: Callable[[Tensor], Tensor] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        model = objective.model
        calibration = getattr(objective, "calibration", None) if calibration is None else calibration
        config = settled_config(config, calibration)
        if config.norm_stats in ("ema", "blend", "batch") and not norm_layers(model):
            raise ConfigError(f"this model has no BatchNorm: norm_stats={config.norm_stats!r} does not apply to it")
        self.model, self.preprocess = model, preprocess
        self.adapter = StreamAdapter(
            model, objective, config=config, calibration=calibration, preprocess=preprocess, predict=predict
        )

    @property
    def loss(self) -> float | None:
        """The label-free loss before the last frame's first step."""
        report = self.adapter.last
        return report.losses[0] if report is not None and report.losses else None

    def step(self, frame: Any) -> Tensor:
        """Adapt, then predict."""
        return self.adapter.step(frame)

    def predict(self, x: Tensor) -> Tensor:
        """Class scores with the weights as they are."""
        return self.adapter.forward(x)

    def state_dict(self) -> dict[str, Any]:
        """The stream's."""
        return self.adapter.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Let the stream go on; errors as `StreamAdapter.load_state_dict`."""
        self.adapter.load_state_dict(saved)

    def close(self) -> None:
        """Detach the adapter; the source weights are back."""
        self.adapter.detach()
