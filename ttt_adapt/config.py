"""StreamConfig: every choice of the streaming algorithm, with the paper's arms as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ttt_adapt.arms import preset_fields
from ttt_adapt.errors import ConfigError, nearest


@dataclass(frozen=True)
class StreamConfig:
    """How a model adapts to a stream. Immutable; `replace` makes a changed copy.

    Attributes:
        window: explicit memory, the last k frames, the current one included. "auto" chooses k for each frame, at most
            32, from how far and how noisily the gradient moves (`ttt_adapt.stream.auto_window.AutoWindow`).
        batch_size: frames (or crops of them) that are drawn from the window, with replacement, for a gradient step.
        iterations: gradient steps per frame; 0: none, frames are only predicted.
        carry_weights: implicit memory: the weights go on from frame to frame. False: every frame starts from the source
            weights.
        source_pull: in [0, 1]; before the steps of each frame the adapted weights go this fraction of the way back to
            the source weights. 0 is the paper, 1 is no memory. Running statistics follow `norm_momentum`; only 1 takes
            them back too.
        restart_optimizer: forget the optimizer's state before each frame, as the paper's code does. Without carried
            weights it is always forgotten.
        lr: learning rate of the decoder.
        encoder_lr_scale: the encoder's learning rate is `lr * encoder_lr_scale`.
        weight_decay: decoupled weight decay; never on norms, biases, tokens and position embeddings.
        grad_clip: largest norm of the whole gradient; None: unlimited.
        crop_size: (H, W) or side of random crops for the gradient step; None: whole frames.
        micro_batch: how many draws go through the model at once; None: the whole batch. A larger batch goes in parts,
            in less memory, and the gradients of the parts are added. The sum is the gradient of the whole batch, up to
            rounding, for objectives that follow `objectives.SplitLoss`, as `MAEBranch` does. Other objectives draw anew
            for each part, and a part counts by the number of its images.
        grad_checkpointing: the encoder's repeated blocks keep only their inputs and run again in the backward pass. The
            gradients are the same, in less memory, and a step takes one more forward pass of the blocks.
        precision: of the gradient step: "fp32" (as the process is set up), "tf32" (on CUDA devices from compute
            capability 8.0 on), or "bf16" by autocast. Weights, optimizer and predictions keep their own precision.
            "fp16" is refused: its gradients would need a loss scale, and "bf16" needs none.
        norm_stats: the statistics that BatchNorm normalises a frame with: "frozen" (the running statistics), "ema" (the
            running statistics, which move with every frame that is adapted to), "blend" (a blend of the running
            statistics and the frame's own, with its unbiased variance) or "batch" (the frame's own, with its biased
            variance, as PyTorch does in training). "calibrated" is for every kind of model, and needs a calibration: a
            frame is corrected by the share of its own statistics that its distance from the source asks for
            (`ttt_adapt.model.rule`). "auto" is "calibrated" for a model with a calibration, and else "frozen".
            Masked frames never change the running statistics. A layer that sees
            one value per channel, such as BatchNorm behind global pooling, uses its running statistics. Models without
            BatchNorm ignore "ema", "blend" and "batch".
        norm_momentum: weight of the current frame in "ema" and "blend"; None: 0.05 and 0.5.
        drop_path: stochastic depth and dropout are active in the gradient step.
        engine: how a step runs: "eager", "compile" (`torch.compile`), "cudagraph" (recorded once, then replayed), or
            "auto", which is the eager engine today. `StreamAdapter.engine` says which one runs, and why.
        every: adapt to every n-th frame only.
        gate: "none", or "surprise": the loss of a batch is taken first, without a gradient, and the frame is adapted to
            only if that loss exceeds the mean of the last 50 such losses by more than one standard deviation. Otherwise
            the weights stay as they are; they are not pulled to the source either. "calibrated": a frame that is no
            further from the source than 95 % of the stills of the calibration is predicted by the source weights; the
            stream begins anew at the next frame that is further. The source weights decide, in a pass of their own: the
            prediction of a usual frame, and one pass more for every other. It needs norm_stats "calibrated".
        adapt: which parameters a stream adapts, and so what it holds in memory beside its window. "all": those of the
            encoder and of the branch, as in the paper. With the others the branch stays as it was trained, and of the
            encoder learn: "norms", weights and biases of layers that normalise; "bias", all biases; "last:N", the last
            N of its repeated blocks, and layers that normalise behind them; "lora:R", factors of rank R on its linear
            layers and 1x1 convolutions (`ttt_adapt.model.low_rank`).
        guards: a stream is watched over, see "Leave it running" in the docs: a frame without contrast, a camera that
            hangs, a loss that is a spike or not finite, weights, statistics and predictions that are not finite, and
            predictions that collapse to one class. An ordinary video gets the same bits without them.
        on_cut: what a guard does where another scene begins: "keep" (nothing), "shrink" (draws see frames from the cut
            on only), or "reset" (weights and optimizer begin anew as well).
        max_drift: how far the adapted weights may be from the source weights, in parts of the norm of the source
            weights; a guard looks every 16 frames, and moves them back to this distance. None: any distance.
        max_ms: time per frame, in milliseconds, such as 40 for 25 frames per second: a stream that falls behind leaves
            gradient steps out until it has caught up. The host then waits for the device. None: no limit.
        seed: of masks, draws and crops.
    """

    window: int | str = 16
    batch_size: int = 8
    iterations: int = 1
    carry_weights: bool = True
    source_pull: float = 0.0
    restart_optimizer: bool = False
    lr: float = 1e-5
    encoder_lr_scale: float = 1.0
    weight_decay: float = 0.05
    grad_clip: float | None = None
    crop_size: int | tuple[int, int] | None = None
    micro_batch: int | None = None
    grad_checkpointing: bool = False
    precision: str = "fp32"
    norm_stats: str = "frozen"
    norm_momentum: float | None = None
    drop_path: bool = False
    engine: str = "auto"
    every: int = 1
    gate: str = "none"
    adapt: str = "all"
    guards: bool = True
    on_cut: str = "keep"
    max_drift: float | None = 1.0
    max_ms: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "every"):
            self._settle(name, _count(name, getattr(self, name)))
        adapted_part(self.adapt)
        if not _is_whole(self.iterations) or self.iterations < 0:
            raise ConfigError(f"iterations is {self.iterations!r}; expected a whole number, at least 0")
        self._settle("iterations", int(self.iterations))
        if self.micro_batch is not None:
            self._settle(
                "micro_batch", _count("micro_batch", self.micro_batch, ", or None for the whole batch at once")
            )
        if self.window != "auto":
            self._settle("window", _count("window", self.window, ', or "auto"'))
        elif self.every != 1 or self.gate != "none":
            raise ConfigError(
                f'window="auto" measures a step on each frame of the stream: expected every=1 and gate="none", got '
                f"every={self.every} and gate={self.gate!r}"
            )
        self._settle("source_pull", _number("source_pull", self.source_pull, 0.0, 1.0))
        if self.norm_momentum is not None:
            self._settle("norm_momentum", _number("norm_momentum", self.norm_momentum, 0.0, 1.0))
        for name in ("lr", "encoder_lr_scale", "weight_decay"):
            self._settle(name, _number(name, getattr(self, name), 0.0, float("inf")))
        for name in ("carry_weights", "restart_optimizer", "grad_checkpointing", "drop_path", "guards"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}; expected a whole number from 0 on")
        self._settle("seed", int(self.seed))
        for name in ("grad_clip", "max_drift", "max_ms"):
            if getattr(self, name) is not None:
                self._settle(name, _positive(name, getattr(self, name)))
        if self.precision == "fp16":
            raise ConfigError(
                "precision is 'fp16'; expected 'fp32', 'tf32' or 'bf16': half precision would need a loss scale, and "
                "'bf16' costs the same and needs none"
            )
        _check_choice("precision", self.precision, ("fp32", "tf32", "bf16"))
        _check_choice("norm_stats", self.norm_stats, ("frozen", "ema", "blend", "batch", "calibrated", "auto"))
        _check_choice("gate", self.gate, ("none", "surprise", "calibrated"))
        if self.gate == "calibrated" and self.norm_stats not in ("calibrated", "auto"):
            raise ConfigError(
                'gate="calibrated" asks how far calibrated statistics find a frame: expected norm_stats="calibrated", '
                f"got {self.norm_stats!r}"
            )
        _check_choice("on_cut", self.on_cut, ("keep", "shrink", "reset"))
        if self.on_cut != "keep" and not self.guards:
            raise ConfigError(f"on_cut is {self.on_cut!r}; expected 'keep' without guards, which notice a cut")
        _check_choice("engine", self.engine, ("auto", "eager", "compile", "cudagraph"))
        if self.crop_size is not None:
            self._settle("crop_size", _pair(self.crop_size))

    def _settle(self, name: str, value: Any) -> None:
        """Keep a checked value as a plain Python number, whatever kind of number came."""
        object.__setattr__(self, name, value)

    @property
    def capacity(self) -> int:
        """Frames that the window holds."""
        return 32 if isinstance(self.window, str) else self.window

    @property
    def pull_fraction(self) -> float:
        """How far the weights go back to the source before each frame: `source_pull`, or 1 without carried weights."""
        return self.source_pull if self.carry_weights else 1.0

    @property
    def frame_share(self) -> float:
        """Weight of the current frame in the statistics that BatchNorm predicts with, as `norm_stats` has it."""
        default = {"ema": 0.05, "blend": 0.5, "batch": 1.0}.get(self.norm_stats, 0.0)
        given = self.norm_momentum if self.norm_stats in ("ema", "blend") else None
        return default if given is None else given

    def replace(self, **changes: Any) -> StreamConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **_known(type(self), changes))

    @classmethod
    def for_arm(cls, name: str, **changes: Any) -> StreamConfig:
        """The configuration of an arm of `ttt_adapt.arms`, by name, with some fields changed.

        Raises:
            ConfigError: an unknown arm or field, a value out of range, or an arm that a configuration alone cannot be:
                it adapts no weights, or it has modifiers.
        """
        return cls(**{**preset_fields(name), **_known(cls, changes)})

    @classmethod
    def online(cls, **changes: Any) -> StreamConfig:
        """Both memories: weights go on from frame to frame and the window holds recent frames. Our best preset."""
        return cls.for_arm("online", **changes)

    @classmethod
    def no_memory(cls, **changes: Any) -> StreamConfig:
        """Every frame on its own, from the source weights."""
        return cls.for_arm("no-memory", **changes)

    @classmethod
    def implicit_only(cls, **changes: Any) -> StreamConfig:
        """The weights go on; each step sees the current frame only."""
        return cls.for_arm("implicit", **changes)

    @classmethod
    def explicit_only(cls, **changes: Any) -> StreamConfig:
        """A window of frames; every frame starts from the source weights."""
        return cls.for_arm("explicit", **changes)

    @classmethod
    def paper(cls, **changes: Any) -> StreamConfig:
        """The recipe of the paper's released code ("Test-Time Training on Video Streams", 2023).

        Window 16, batch 32, AdamW at 1e-4 with the encoder at a tenth of it, clipped to norm 0.01, restarted every
        frame, stochastic depth active. Its masks hide 0.85 and its loss is on all pixels: those two are settings of
        `MAEBranch.attach`.
        """
        return cls.for_arm("paper", **changes)


def _known(config: type[StreamConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes`, if all of them are fields."""
    known = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in known:
            raise ConfigError(f"StreamConfig has no field {name!r}; {_hint(name, known)}")
    return changes


ALIASES = {
    "learning_rate": "lr",
    "step_size": "lr",
    "encoder_lr": "encoder_lr_scale",
    "trainable": "adapt",
    "adapted": "adapt",
    "lora": "adapt",
    "lora_rank": "adapt",
    "steps": "iterations",
    "epochs": "iterations",
    "batch": "batch_size",
    "memory": "window",
    "crop": "crop_size",
    "clip_grad": "grad_clip",
    "max_grad_norm": "grad_clip",
    "momentum": "norm_momentum",
    "dtype": "precision",
    "amp": "precision",
}
"""What others call a field."""
OF_THE_BRANCH = ("mask_ratio", "patch_size", "masking", "decoder", "loss_on", "norm_pix_loss")
"""What is no field, but a setting of `MAEBranch.attach`."""


def _hint(name: str, known: list[str]) -> str:
    """Where an unknown field is to be found."""
    plain = name.replace("-", "_").lower()
    if plain in OF_THE_BRANCH:
        return f"{plain} is a setting of the `branch` (MAEBranch.attach)"
    return f"it is called {ALIASES[plain]!r}" if plain in ALIASES else nearest(plain, known)


def _is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, of Python or of NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(name: str, value: Any, alternative: str = "") -> int:
    if not _is_whole(value) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number, at least 1{alternative}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == float("inf"):
        limit = f"between {low:g} and {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise ConfigError(f"{name} is {value!r}; expected a number {limit}")
    return int(value) if isinstance(value, Integral) else float(value)


def _positive(name: str, value: Any) -> float:
    found = _number(name, value, 0.0, float("inf"))
    if found == 0:
        raise ConfigError(f"{name} is {value!r}; expected a positive number, or None for no limit")
    return found


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def adapted_part(adapt: Any) -> tuple[str, int]:
    """What `StreamConfig.adapt` names: "lora:4" -> ("lora", 4); names without a number have 0.

    Raises:
        ConfigError: it names nothing.
    """
    name, colon, digits = adapt.partition(":") if isinstance(adapt, str) else ("", "", "")
    if name in ("all", "norms", "bias") and not colon:
        return name, 0
    if name in ("last", "lora") and digits.isascii() and digits.isdigit() and 0 < len(digits) <= 9 and int(digits):
        return name, int(digits)
    raise ConfigError(
        f'adapt is {adapt!r}; expected "all", "norms", "bias", "last:N" or "lora:N" with a whole number N of at least '
        "1, such as last:2"
    )


def _pair(size: Any) -> tuple[int, int]:
    pair = (size, size) if _is_whole(size) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(pair) != 2 or not all(_is_whole(side) and side >= 1 for side in pair):
        raise ConfigError(f"crop_size is {size!r}; expected (height, width) or one side in pixels, or None")
    return int(pair[0]), int(pair[1])
