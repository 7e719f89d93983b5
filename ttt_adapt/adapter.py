"""StreamAdapter: online test-time training on a video stream.

What happens to a frame is in `ttt_adapt/sharing/frame.py`, in the order of the paper, and what a user does with a video
is in `ttt_adapt/sharing/video.py`. Here a model is taken, and given back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.choose import choose_engine
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.calibration import Calibration, settled_config
from ttt_adapt.model.correction import correction_of
from ttt_adapt.model.frames import FrameIntake, Preprocess, default_preprocess
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.model.norms import norm_layers
from ttt_adapt.model.outside_changes import OutsideChanges
from ttt_adapt.model.ownership import Ownership, check_unowned, check_unshared
from ttt_adapt.model.threads import lock_of, one_at_a_time
from ttt_adapt.model.wrappers import unwrapped
from ttt_adapt.objectives.base import Objective
from ttt_adapt.objectives.check_objective import check_attached, check_objective, warn_if_untrained
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.sharing.frame import FrameSteps
from ttt_adapt.sharing.model import SharedModel
from ttt_adapt.sharing.parking import Parking
from ttt_adapt.sharing.stream import OpenStreams, Stream
from ttt_adapt.sharing.video import OneVideo
from ttt_adapt.stream.adapted_weights import adapted_tensors
from ttt_adapt.stream.check_saved import setting_of, source_of
from ttt_adapt.stream.optimizer import ParamGroups, adamw, parameter_groups
from ttt_adapt.stream.source import SourceWeights
from ttt_adapt.stream.state import StreamState


class StreamAdapter(OneVideo):
    """Keeps a model learning from the video it is watching: `prediction = adapter.step(frame)`.

    While attached, the model is in eval mode and its encoder's weights change in place. `detach()` (or leaving the
    `with` block) gives it back with its source weights and its own flags. Several threads may call it: their calls run
    one after the other. It is not copied and not pickled: `state_dict()` is.

    Args:
        model: the trained model, or a wrapper around the model that the branch is on: it is then what predicts.
        branch: an `MAEBranch` or any other `Objective` on this model. Without it, `encoder` and the other keywords of
            `MAEBranch.attach` make one.
        config: the choices of the algorithm; by default `StreamConfig()`, or for a calibrated model
            `StreamConfig.online()` with the settings that calibration chose.
        calibration: what the model is like on its own ground, from `ttt_adapt.calibrate`; by default the branch's.
            With a calibration and without a branch, the stream takes no gradient step: frames are corrected by
            calibrated statistics alone.
        preprocess: uint8 RGB [H, W, 3] -> float [1, 3, H, W] as the model takes it; for timm models the model's own. It
            may return a tuple (that, context): then `predict(x, context)` is called for this frame.
        predict: how the model is called on one preprocessed frame [1, 3, H, W]; `model(x)` by default.
        optimizer: parameter groups -> optimizer; AdamW by default. The groups carry `lr`, `weight_decay` and `name`.
        resident: how many of the streams of `open_stream` keep their state on the device at most; None: all. Of the
            others, those that were idle the longest, it is parked, and comes back bit for bit with their next frame.
        park: where, "cpu" for the memory of the CPU, or a folder.

    Raises:
        ConfigError: neither or both of `branch` and `encoder`, a branch of another model, an unknown keyword, or an
            engine or precision that is not available here.
        EncoderError: see `MAEBranch.attach`.
        StateError: the model already has an adapter, or shares what would be adapted with a model that has one.
    """

    def __init__(
        self,
        model: nn.Module,
        branch: Objective | None = None,
        *,
        config: StreamConfig | None = None,
        calibration: Calibration | None = None,
        preprocess: Preprocess | None = None,
        predict: Callable[..., Any] | None = None,
        optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None = None,
        resident: int | None = None,
        park: str | Path = "cpu",
        **attach: Any,
    ) -> None:
        check_objective(model, branch, attach, needed=calibration is None)
        inside = unwrapped(model if branch is None else branch.model)
        calibration = getattr(branch, "calibration", None) if calibration is None else calibration
        config = settled_config(config, calibration)
        self._handed, plain = model, config.norm_stats == "frozen" or unwrapped(model) is not inside
        predict = (model if plain else inside) if predict is None else predict  # no hook reaches what is compiled
        model = model if branch is None else check_attached(model, branch)
        check_unowned(model)
        check_unowned(inside)
        correction = correction_of(inside, config, calibration)
        if branch is None and not attach and correction is None:
            raise ConfigError(
                f"norm_stats is {config.norm_stats!r}, so the calibration would not be used, and without a branch "
                'nothing would adapt: leave config out, or set norm_stats="calibrated"'
            )
        self._owns_branch = branch is None
        if branch is None:
            branch = MAEBranch.attach(model, **attach) if attach else ForwardOnly(model)
        self._branch: Objective = branch
        step = GradientStep(branch, config)
        own = default_preprocess(model, step.device)
        preprocess = own if preprocess is None else preprocess
        crop: Any = config.crop_size
        intake = FrameIntake(preprocess, step.device, step.dtype, crop, expects=own)
        moving = norm_layers(model) if config.norm_stats == "ema" else []
        adapted = adapted_tensors(branch, step.trained, step.own, moving, step.half.copies)
        tensors = adapted.everything if step.low_rank is None else {**adapted.everything, **step.encoder}
        check_unshared(tensors)
        roots = [m for m in (model, branch) if isinstance(m, nn.Module)]
        groups = parameter_groups(step.trained, step.own, roots, config, step.half.trained)
        make = partial(_fresh, optimizer or adamw, groups)
        whole = [*adapted.statistics, *adapted.memory, *step.half.copies]
        source = SourceWeights(adapted.everything, whole, step.low_rank)
        memory = ModelMemory(model, step.pass_state, tensors.values())
        begin = partial(StreamState.begin, config, adapted, source, make, intake, memory)
        state = begin()
        engine = choose_engine(step, state.optimizer.optimizer)
        self._branch_training = bool(getattr(branch, "training", False))
        outside = OutsideChanges(roots, step.adapted, adapted.statistics.values(), step.replacements)
        limit = float("inf") if calibration is None else calibration.limit
        digest = calibration.digest if calibration is not None and correction is not None else None
        shared = SharedModel(
            config, lock_of(inside), state, begin, intake,
            steps=FrameSteps(engine, predict, correction, limit, memory, outside),
            outside=outside,
            setting=partial(setting_of, branch, preprocess, digest),
            source=functools.cache(partial(source_of, branch, source, memory.start)),
            parking=Parking(resident, park),
        )  # fmt: skip
        super().__init__(shared, state)
        self._open = OpenStreams(shared)
        warn_if_untrained(branch, config)  # before the model changes: a warning may be an error
        shared.ownership = Ownership(shared, model, tensors, step.parameters, source.restore, memory.start, inside)
        branch.train(False)
        outside.accept_modes()

    @property
    def branch(self) -> Objective:
        """The objective that the stream is adapted with."""
        return self._branch

    @property
    def state(self) -> StreamState:
        """All that belongs to the video of the adapter's own stream."""
        return self._state

    @property
    def engine(self) -> tuple[str, str]:
        """How a step runs, and why so."""
        engine = self._shared.steps.engine
        return engine.name, engine.reason

    @property
    def streams(self) -> list[str]:
        """Names of the streams that `open_stream` opened, without those that are closed."""
        return self._open.names

    @one_at_a_time
    def open_stream(self, name: str) -> Stream:
        """Another stream over the same model, at its beginning. It gives what an adapter of its own would give.

        The streams take turns, in any order, and in any thread. `step` of the adapter itself is one more stream. The
        model holds the weights of the stream that was called last.

        Args:
            name: of the stream, such as "cam-3"; one stream of a name can be open.

        Returns:
            A handle with `step`, `adapt`, `predict`, `reset`, `state_dict`, `load_state_dict`, `close` and what else a
            video has.

        Raises:
            ConfigError: no name.
            StateError: a stream of this name is open, or the adapter is detached.
        """
        return self._open.open(name)

    @one_at_a_time
    def new_state(self) -> StreamState:
        """The state of another video over the same model, at its beginning; `swap` puts it in."""
        return self._shared.another()

    @one_at_a_time
    def swap(self, state: StreamState) -> StreamState:
        """Go on with another video: its weights are copied into the model, in place.

        What the model's own passes keep of a video (a recurrent state, a count) stays with that video.

        Args:
            state: from `new_state`, or returned by an earlier `swap` of this adapter.

        Returns:
            The state of the video so far.

        Raises:
            StateError: the state is of another adapter, or somebody else changed the model; nothing has changed.
        """
        self._shared.enter(state)
        before, self._held = self._held, state
        return before

    @one_at_a_time
    def detach(self, keep_adapted: bool = False) -> nn.Module:
        """Give the model back as it was, with its source weights; may be called twice.

        Args:
            keep_adapted: keep the adapted weights instead, in the model and in the branch.
        """
        if not self._shared.ownership.ended:
            self._shared.steps.engine.forget()
            self._shared.steps.forget_passes()
            self._open.close()
            self._branch.train(self._branch_training)  # first: a decoder may hold layers of the model's own
            self._shared.ownership.give_back(keep_adapted)
            self._state.weights.release()
            if self._owns_branch:
                self._branch.detach()
        return self._handed

    def __enter__(self) -> StreamAdapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def _fresh(make: Callable[[ParamGroups], torch.optim.Optimizer], groups: ParamGroups) -> torch.optim.Optimizer:
    """A new optimizer of parameter groups that it may change."""
    return make([dict(group) for group in groups])
