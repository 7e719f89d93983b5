"""StreamAdapter: online test-time training on a video stream, in the order of the paper.

"Test-Time Training on Video Streams" (Wang et al.), section 4: for each frame, push it into the window, take a gradient
step on the reconstruction of a batch drawn from the window, then predict the frame with the updated encoder.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine import Beside, Problem, StepReport, choose_engine, explained_memory_errors
from ttt_adapt.errors import ConfigError, FrameError, StateError
from ttt_adapt.model.dropout import drop_layers, dropping
from ttt_adapt.model.norms import frame_statistics, norm_layers, updating_norms
from ttt_adapt.model.ownership import adapted_tensors, check_arguments, check_free, give_back, lend, memory_of
from ttt_adapt.objectives.base import Drawn, Objective
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.stream.auto_window import AutoWindow, gradient_sketch
from ttt_adapt.stream.frames import Normalize, Preprocess, default_preprocess, pixels_of, scaling, to_model_input
from ttt_adapt.stream.optimizer import (
    ParamGroups,
    Restart,
    adamw,
    decides_on_device,
    parameter_groups,
    step_if,
    total_norm,
)
from ttt_adapt.stream.schedule import SurpriseGate
from ttt_adapt.stream.source import Snapshot, copied
from ttt_adapt.stream.state import check_saved, check_window, loaded_optimizer, setting_of
from ttt_adapt.stream.window import FrameWindow

__all__ = ["StepReport", "StreamAdapter"]


def _call_with(predict: Callable[..., Any], context: tuple[Any, ...], x: Tensor) -> Any:
    return predict(x, *context)


class StreamAdapter:
    """Keeps a model learning from the video it is watching: `prediction = adapter.step(frame)`.

    While attached, the model is in eval mode and its encoder's weights change in place. `detach()` (or leaving the
    `with` block) gives it back with its source weights and its own flags.

    Args:
        model: the trained model.
        branch: an `MAEBranch` or any other `Objective` on this model. Without it, `encoder` and the other keywords of
            `MAEBranch.attach` make one.
        config: the choices of the algorithm.
        preprocess: uint8 RGB [H, W, 3] -> float [1, 3, H, W] as the model takes it; for timm models the model's own.
        predict: how the model is called on one preprocessed frame [1, 3, H, W]; `model(x)` by default.
        optimizer: parameter groups -> optimizer; AdamW by default. The groups carry `lr`, `weight_decay` and `name`.

    Raises:
        ConfigError: neither or both of `branch` and `encoder`, a branch of another model, an unknown keyword, or an
            engine or precision that is not available here.
        EncoderError: see `MAEBranch.attach`.
        StateError: the model already has an adapter, or shares what would be adapted with a model that has one.
    """

    _context: tuple[Any, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        branch: Objective | None = None,
        *,
        config: StreamConfig | None = None,
        preprocess: Preprocess | None = None,
        predict: Callable[..., Any] | None = None,
        optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None = None,
        **attach: Any,
    ) -> None:
        config = StreamConfig() if config is None else config
        check_arguments(model, branch, config, attach)
        self._owns_branch = branch is None
        self._branch: Objective = MAEBranch.attach(model, **attach) if branch is None else branch
        self._model, self.config = model, config
        encoder = dict(self._branch.encoder_parameters())
        if not encoder:
            raise ConfigError("the branch names no encoder parameters: there is nothing to adapt")
        inside = {id(p) for p in encoder.values()}  # a weight that the decoder shares is the encoder's
        own = {n: p for n, p in self._branch.named_parameters() if p.requires_grad and id(p) not in inside}
        first = next(iter(encoder.values()))
        self._device, self._dtype = first.device, first.dtype
        self._parameters = [*encoder.values(), *own.values()]
        self._frozen = [p for p in encoder.values() if not p.requires_grad]
        self._norms = norm_layers(model)
        self._drops = drop_layers(model) if config.drop_path else []
        self._preprocess = default_preprocess(model, self._device) if preprocess is None else preprocess
        self._predict = model if predict is None else predict
        modules = [m for m in (model, self._branch) if isinstance(m, nn.Module)]
        groups = parameter_groups(encoder, own, modules, config)
        make = optimizer or adamw
        self._make_optimizer = torch.inference_mode(False)(lambda: make([dict(group) for group in groups]))
        self._set_optimizer(self._make_optimizer())
        self._generator = torch.Generator(self._device).manual_seed(config.seed)
        self._engine = choose_engine(config, self._branch, self._optimizer, self._generator)
        self._problem = Problem(self._branch, self._parameters, len(encoder), self._generator, config, self._device)
        self._beside = Beside(self._device, config.deferred)
        memory, self._after_step = memory_of(self._branch)
        self._tensors = adapted_tensors(encoder, own, self._norms if config.norm_stats == "ema" else [])
        self._pull = config.source_pull if config.carry_weights else 1.0
        statistics = [name for name in self._tensors if name.startswith("norm.")]
        self._statistics = [self._tensors[name] for name in statistics]
        self._tensors |= memory
        self._remembers = bool(memory)
        check_free(self._tensors)
        self._source = Snapshot(self._tensors, whole=[*statistics, *memory])
        self._window = FrameWindow(config.capacity, scaling(self._preprocess, self._dtype))
        self._auto = AutoWindow(config.capacity, draws=config.batch_size) if config.window == "auto" else None
        self._flags = {module: module.training for module in model.modules()}
        self._attached = True
        self._gate = SurpriseGate()
        self._frame_index = 0
        self.last: StepReport | None = None
        lend(model, self._tensors)
        # an adapter that is lost without detach() gives the model back too
        self._finalizer = weakref.finalize(
            self, give_back, model, self._source, self._flags, self._parameters, self._beside.settle
        )
        self._finalizer.atexit = False
        model.eval()
        self._branch_training = bool(getattr(self._branch, "training", False))
        self._branch.train(False)

    @property
    def branch(self) -> Objective:
        """The objective that the stream is adapted with."""
        return self._branch

    @property
    def window(self) -> int:
        """How many frames the next step draws from, the frame that comes included, once as many were seen."""
        return self.config.capacity if self._auto is None else self._auto.length

    @property
    def engine(self) -> tuple[str, str]:
        """How a step runs, and why so."""
        return self._engine.name, self._engine.reason

    def step(self, frame: Any) -> Any:
        """Adapt to a frame, then predict it; the other way round with `deferred`.

        Args:
            frame: uint8 RGB [H, W, 3] (NumPy or tensor), or float [3, H, W] or [1, 3, H, W] as the model takes it.

        Returns:
            Exactly what the model (or `predict`) returns.

        Raises:
            FrameTypeError, FrameError: a frame that cannot be used; nothing has changed.
            EncoderError: the model's weights were replaced by other tensors; nothing has changed.
            MemoryLimitError: out of memory; in the gradient step, the frame was not taken into the stream. After any
                error in the gradient step, window, random state and counters are as before, and the weights are those
                of the last finished iteration (pulled toward the source, if `source_pull` asks for it).
        """
        x, pixels = self._taken(frame)
        if self.config.deferred:
            prediction = self._predict_input(x)
            self._beside.run(self._adapt, x, pixels)
            return prediction
        self._adapt(x, pixels)
        return self._predict_input(x)

    def adapt(self, frame: Any) -> StepReport:
        """Take the frame into the window and the gradient steps on it; arguments and errors as in `step`."""
        return self._adapt(*self._taken(frame))

    def predict(self, frame: Any) -> Any:
        """Predict a frame with the weights as they are; it does not enter the stream."""
        return self._predict_input(self._take(frame))

    def stream(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Predictions for `frames`, one by one as they come: lazy, nothing is kept but the window."""
        for frame in frames:
            yield self.step(frame)

    def reset(self) -> None:
        """Begin a new video: source weights, empty window, fresh optimizer, the seed again, counters at 0."""
        self._check_attached()
        self._source.restore()
        torch.clear_autocast_cache()
        self._set_optimizer(self._make_optimizer())
        self._window.clear()
        self._generator.manual_seed(self.config.seed)
        self._gate = SurpriseGate()
        if self._auto is not None:
            self._auto.reset()
        self._frame_index = 0
        self.last = None

    def detach(self, keep_adapted: bool = False) -> nn.Module:
        """Give the model back as it was, with its source weights; may be called twice.

        Args:
            keep_adapted: keep the adapted weights instead, in the model and in the branch.
        """
        if self._attached:
            self._engine.forget()
            self._finalizer.detach()
            self._branch.train(self._branch_training)  # first: a decoder may hold layers of the model's own
            source = None if keep_adapted else self._source
            give_back(self._model, source, self._flags, self._parameters, self._beside.settle)
            if self._owns_branch:
                self._branch.detach()
            self._attached = False
        return self._model

    def __enter__(self) -> StreamAdapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # ---- one frame, in the paper's order

    def _adapt(self, x: Tensor, pixels: Tensor | None = None) -> StepReport:
        started = time.perf_counter()
        sketch, numbers = None, None
        with self._undone_if_it_fails():
            self._problem.check_parameters()
            if self._engine.strict:
                self._problem.check_steady(self._engine.name)
            self._window.stage(x[0], pixels)
            state = (self._window.tick(self.window), self._settings(), self._weights()) if self._engine.records else ()
            skipped = "" if self._frame_index % self.config.every == 0 else "every"
            if skipped or self.config.gate != "none":  # an update begins with it
                self._forget_weights()
            surprise = self._surprise() if self.config.gate == "surprise" and not skipped else None
            if surprise is not None and not self._gate.is_open(surprise):
                skipped = "gate"
            if not skipped:
                numbers, sketch = self._engine.run("update", self._update, x, key=state)
        self._window.commit()
        if surprise is not None:
            self._gate.record(surprise)
        if self._auto is not None and sketch is not None and numbers is not None and bool(numbers[0, 1].isfinite()):
            self._auto.update(sketch.tolist())
        ms = (time.perf_counter() - started) * 1e3
        self.last = StepReport(self._frame_index, skipped, ms, numbers, surprise if skipped == "gate" else None)
        self._frame_index += 1
        return self.last

    def _settings(self) -> Hashable:
        """What a recorded update depends on of the objective, beside its tensors."""
        return self._branch.settings() if isinstance(self._branch, Drawn) else ()

    def _weights(self) -> int:
        """Another number where others were put in the place of tensors that a recording reads."""
        return self._problem.watch.version()

    def _surprise(self) -> float:
        """The loss of a batch with the weights as they are, without a gradient: what the gate looks at."""
        return float(self._engine.loss(self._problem, self._draw()))

    def _update(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a frame does to the weights; nothing here waits for the device, so that an engine may record it.

        Returns:
            [iterations, 2], the loss and gradient norm of each step; and what the automatic window wants to know of the
            frame's first gradient.
        """
        self._recall_source()
        self._renew_norm_stats(x)
        if self.config.restart_optimizer or self._pull == 1.0:
            self._restart_optimizer(in_place=self._engine.records)
        steps = [self._iterate(i) for i in range(self.config.iterations)]
        return torch.stack([numbers for numbers, _ in steps]), steps[0][1]

    def _draw(self) -> Tensor:
        """A batch from the window."""
        crop: Any = self.config.crop_size
        return self._window.draw(self.config.batch_size, self._generator, crop, self.window)

    def _forget_weights(self) -> None:
        """Without carried weights every frame starts from the source, whatever becomes of it."""
        if self._pull == 1.0:
            self._recall_source()

    def _recall_source(self) -> None:
        """Implicit memory: carry the weights on, pull them toward the source, or start from it."""
        self._source.pull(self._pull)

    def _iterate(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """One gradient step, taken if the gradient is finite: its loss and gradient norm, and a sketch of the first."""
        batch = self._draw()
        with self._learning(iteration):
            loss = self._engine.gradients(self._problem, batch)
            norm = total_norm([p.grad for p in self._parameters if p.grad is not None])
            sketch = gradient_sketch(self._parameters) if iteration == 0 and self._auto is not None else None
            if self.config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(self._parameters, self.config.grad_clip, norm)
            if self._engine.records or (self._device.type == "cuda" and self._may_decide_later()):
                step_if(self._optimizer, norm.isfinite())
                self._after_step()
            elif bool(norm.isfinite()):
                self._optimizer.step()
                self._after_step()
        return torch.stack([loss.float(), norm.float()]), sketch

    def _may_decide_later(self) -> bool:
        """Whether a gradient that is not finite can be left out without asking for it on the host."""
        return decides_on_device(self._optimizer) and not self._remembers

    def _predict_input(self, x: Tensor) -> Any:
        weights = self._weights() if self._engine.records else ()  # those that the model has, outside of what follows
        own = frame_statistics(self.config.norm_stats, self._norms, self.config.frame_share)
        with torch.no_grad(), explained_memory_errors(self.config), own:
            call = partial(_call_with, self._predict, self._context) if self._context else self._predict
            return self._engine.predict(call, x, key=weights)

    @torch.no_grad()
    def _renew_norm_stats(self, x: Tensor) -> None:
        """Let clean frames into the running statistics of BatchNorm, if asked for."""
        if self.config.norm_stats == "ema" and self._norms:
            with updating_norms(self._norms, self.config.frame_share):
                self._predict(x, *self._context)

    # ---- what surrounds it

    def _taken(self, frame: Any) -> tuple[Tensor, Tensor | None]:
        """A frame as the model takes it, [1, 3, H, W]; and as it came, [H, W, 3], where the window may hold that."""
        with torch.inference_mode(False):
            pixels = pixels_of(frame, self._preprocess, self._device)
        x = self._take(frame if pixels is None else pixels)
        same = pixels is not None and pixels.shape[:2] == x.shape[2:]  # not resized
        return x, pixels if same else None

    def _split(self, frame: Any) -> Any:
        assert self._preprocess is not None
        made: Any = self._preprocess(frame)
        if isinstance(made, tuple):
            made, self._context = made[0], made[1:]
        return made

    def _take(self, frame: Any) -> Tensor:
        self._check_attached()
        with torch.inference_mode(False), torch.no_grad():
            self._context = ()
            plain = self._preprocess is None or isinstance(self._preprocess, Normalize)
            preprocess = self._preprocess if plain else self._split
            x = to_model_input(frame, preprocess, self._device, self._dtype)
            if x.is_inference():
                x = x.clone()
        known = self._window.frame_shape
        if known is not None and known != tuple(x.shape[1:]):
            raise FrameError(
                f"the frame became {tuple(x.shape[2:])} (H, W) as the model takes it, and the stream so far is "
                f"{known[1:]}: call reset() where a new video begins, or resize the frames"
            )
        crop: Any = self.config.crop_size
        if crop is not None and (crop[0] > x.shape[2] or crop[1] > x.shape[3]):
            raise FrameError(f"crop_size {crop} does not fit into a frame of {tuple(x.shape[2:])} (H, W): lower it")
        return x

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Outside of inference mode; if the block raises, random state and running statistics are as before."""
        random_state = self._generator.get_state()
        statistics = copied(self._statistics)
        with torch.inference_mode(False), torch.no_grad():
            try:
                with explained_memory_errors(self.config):
                    yield
            except BaseException:
                self._generator.set_state(random_state)
                for live, before in zip(self._statistics, statistics, strict=True):
                    live.copy_(before)
                raise
            finally:
                for parameter in self._parameters:
                    parameter.grad = None
                torch.clear_autocast_cache()  # an outer autocast would predict with casts of the old weights

    @contextmanager
    def _learning(self, iteration: int) -> Iterator[None]:
        """requires_grad on, and stochastic depth if asked for, during a gradient step."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        step = self._frame_index * self.config.iterations + iteration
        try:
            with dropping(self._drops, (self.config.seed + step * 0x9E3779B97F4A7C15) % 2**64, self._device):
                yield
        finally:
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def _set_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._restart_optimizer = optimizer, Restart(optimizer)
        if hasattr(self, "_engine"):
            self._engine.forget()

    def _check_attached(self) -> None:
        if not self._attached:
            raise StateError("this adapter is detached and its model is free: make a new StreamAdapter")
        self._beside.settle()

    # ---- saving mid-stream

    def state_dict(self) -> dict[str, Any]:
        """A copy of all of the stream's state: weights, optimizer, window, random state, counters."""
        self._check_attached()
        return {
            "config": asdict(self.config),
            "setting": setting_of(self._branch, self._preprocess),
            "weights": {name: tensor.detach().clone() for name, tensor in self._tensors.items()},
            "optimizer": {"kind": type(self._optimizer).__name__, "state": copied(self._optimizer.state_dict())},
            "window": self._window.state_dict(),
            "random": self._generator.get_state(),
            "gate": self._gate.losses(),
            "auto": None if self._auto is None else self._auto.state_dict(),
            "frame_index": self._frame_index,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; a state that does not fit changes nothing.

        Raises:
            CheckpointError: the state is of another model, configuration, objective or preprocessing.
        """
        self._check_attached()
        check_saved(state, self.config, setting_of(self._branch, self._preprocess), self._tensors)
        check_window(state["window"], self.config, self._preprocess, self._dtype)
        auto = None if self._auto is None else AutoWindow(self.config.capacity, draws=self.config.batch_size)
        if auto is not None:
            auto.load_state_dict(state["auto"])
        saved = state["optimizer"], state["random"]
        with torch.inference_mode(False):
            self._set_optimizer(loaded_optimizer(*saved, self._make_optimizer, self._device))
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state["weights"][name])
            self._window.load_state_dict(state["window"], self._device)
        torch.clear_autocast_cache()
        self._generator.set_state(state["random"].cpu())
        self._gate, self._auto = SurpriseGate(state["gate"]), auto
        self._frame_index = state["frame_index"]
        self.last = None
