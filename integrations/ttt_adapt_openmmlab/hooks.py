"""OnlineTTTHook: test-time training inside MMEngine's test loop, by one entry in `custom_hooks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from ttt_adapt import StepReport, StreamAdapter
from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError
from ttt_adapt.integration import LEAST_STILLS, shuffled_epochs
from ttt_adapt_openmmlab.arms import arm_name, contradiction, stream_config
from ttt_adapt_openmmlab.batches import only_sample, predicted, prepared
from ttt_adapt_openmmlab.datasets.frame_order import FrameOrder, file_of, video_of
from ttt_adapt_openmmlab.datasets.loaders import check_stream, offline_indices, stream_infos
from ttt_adapt_openmmlab.decoders import branch_settings
from ttt_adapt_openmmlab.joint import data_preprocessor_of, find_branch, plain_model, unwrapped
from ttt_adapt_openmmlab.reconstruction import reconstruction_picture
from ttt_adapt_openmmlab.run_calibration import fits, known_calibration, made_calibration, stills_of
from ttt_adapt_openmmlab.stream_branch import branch_for_stream
from ttt_adapt_openmmlab.totals import Totals


@HOOKS.register_module()
class OnlineTTTHook(Hook):
    """Adapts the model to the video before each test iteration; after the run the model is as it was.

    Frames of a calibrated model are predicted with calibrated statistics (`norm_stats="auto"` in most arms). The
    calibration is that of `calibration`, or else that of the branch. Where neither is there, `stills` makes one: in the
    last iteration of a training run, so that the last checkpoint of a `JointMAE` holds it, or before the first frame of
    a test run. With an `EMAHook`, which saves other weights than those of the last iteration, only the latter.

    The frames come one by one (`batch_size=1` of the test dataloader) and in order; several processes need
    `sampler=dict(type='VideoSampler')`. A new video (see `video_of`) starts from the source weights. Labels are never
    read. Explicit arguments win over the arm's preset.

    Args:
        window: explicit memory, the last k frames (the current one included).
        batch_size: frames or crops drawn from the window for a gradient step (not of the dataloader).
        crop_size: (H, W) of random crops for the gradient step; None: whole frames.
        arm: "online" (both memories), "no-memory", "implicit", "explicit", "paper" (the released code's recipe),
            "fixed" (no adaptation: the hook does nothing), "calibrated" (calibrated statistics and no gradient step:
            no branch is needed), or "offline": before a video is predicted, the model adapts
            to `offline_steps` of its frames, which come again and again in an order shuffled by the seed, without a
            pull toward the source; then all are predicted with these weights.
        branch: None for the branch of a `JointMAE` model, or keywords of `MAEBranch.attach` to attach one to the
            plain model (`encoder="backbone"` by default); `checkpoint=` names a file or URL with its weights, as
            `JointMAE` saves them.
        calibration: a file that `Calibration.save` wrote.
        stills: how many images of the training set to calibrate on, at least 8, as the test pipeline makes them; 0:
            none.
        log_interval: a line in the log every n frames. Scalars `ttt/loss` and `ttt/ms` go to the message hub and the
            visualizer on every frame.
        visualize_interval: every n frames an image (frame, masked frame, reconstruction) to the visualizer; 0: never.
        offline_steps: frames that arm "offline" adapts to before each video.
        **config: other fields of `ttt_adapt.StreamConfig`: lr, iterations, source_pull, seed, precision, ...

    Raises:
        ConfigError: an unknown arm or argument, or a value out of range, when it is made; before the run anything
            that cannot be adapted or is no video stream.
        DataError, FrameError: a frame out of order, or of another size than its video; the message names the file.
    """

    priority = "NORMAL"

    def __init__(
        self,
        window: int | None = None,
        batch_size: int | None = None,
        crop_size: int | tuple[int, int] | None = None,
        arm: str = "online",
        branch: Mapping[str, Any] | None = None,
        calibration: str | None = None,
        stills: int = 0,
        log_interval: int = 10,
        visualize_interval: int = 0,
        offline_steps: int = 1000,
        **config: Any,
    ) -> None:
        given = {"window": window, "batch_size": batch_size, "crop_size": crop_size}
        self._given = config | {name: value for name, value in given.items() if value is not None}
        self.config = stream_config(arm, self._given)
        for name, value, least in (
            ("stills", stills, 0),
            ("log_interval", log_interval, 1),
            ("visualize_interval", visualize_interval, 0),
            ("offline_steps", offline_steps, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; expected a whole number, at least {least}")
        if 0 < stills < LEAST_STILLS:
            raise ConfigError(f"stills is {stills}; expected at least {LEAST_STILLS}, better 40, or 0 for none")
        self.arm, self.offline_steps = arm_name(arm), offline_steps
        self.branch = None if branch is None else branch_settings(branch, "checkpoint")
        self.log_interval, self.visualize_interval = log_interval, visualize_interval
        self.calibration, self.stills = calibration, stills
        self._adapter: StreamAdapter | None = None
        self._statistics = ExitStack()
        self._flags: dict[nn.Module, bool] = {}

    # ---- the run

    def before_run(self, runner: Any) -> None:
        """Make sure that the model is given back, also when the test run fails."""
        loop = runner._test_loop
        if not isinstance(loop, BaseLoop) or "run" in vars(loop):
            return
        inner = loop.run

        def run() -> Any:
            try:
                return inner()
            finally:
                vars(loop).pop("run", None)
                self._give_back()

        loop.run = run

    def before_train(self, runner: Any) -> None:
        """Check that the last iteration will be able to calibrate."""
        if self._calibrates_after(runner):
            stills_of(runner, self.stills)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """In the last iteration, calibrate a `JointMAE`, before its checkpoint is saved."""
        if self._calibrates_after(runner) and self.is_last_train_iter(runner):
            made_calibration(runner, find_branch(runner.model), self.stills)

    def _calibrates_after(self, runner: Any) -> bool:
        """Whether a training run ends with a calibration: not where other weights are saved than it ends with."""
        averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        return bool(self.stills) and find_branch(runner.model) is not None and not averaged

    def before_test(self, runner: Any) -> None:
        """Check model, dataloader and order of the frames; nothing is changed."""
        self._give_back()
        self._totals, self._order, self._size = Totals(), FrameOrder(), (0, 0)
        self._warned: set[str] = set()
        if self.arm == "fixed":
            return
        loader = runner.test_dataloader
        check_stream(loader)
        self._preprocessor = data_preprocessor_of(plain_model(runner.model))
        stream = offline_indices(loader) if self.arm == "offline" else stream_infos(loader)
        self._indices, self._infos = stream if stream is not None else ([], [])
        order = FrameOrder()
        for info in self._infos:
            self._follow(runner, order, info)
        self._model = plain_model(runner.model)
        needs_branch = self.arm != "calibrated"
        self._objective = branch_for_stream(runner.model, self.branch, self.config.seed) if needs_branch else None
        self._calibration = known_calibration(runner.model, self._objective, self.calibration, self.config)
        if self._calibration is None and not needs_branch and not self.stills:
            raise ConfigError(
                "arm 'calibrated' needs a calibration: let the hook make one on images of the training set (stills=40),"
                " or name a file (calibration='FILE.safetensors')"
            )
        for warning in self._warnings(runner.model):
            runner.logger.warning(warning)
        self._flags = {module: module.training for module in runner.model.modules()}

    def _warnings(self, model: nn.Module) -> Iterator[str]:
        """Warnings about settings that run, but are probably a mistake."""
        if warning := contradiction(self.arm, self.config):
            yield warning
        if self._objective is None:
            return
        if self.branch is None and unwrapped(model).branch_is_new:
            yield (
                "the checkpoint holds no trained branch (mae_branch), or not the whole of this one. Adapting with an "
                "untrained branch does not help: train it jointly with the model first (ttt-adapt mm train)"
            )
        masks = self._objective.mask_ratio, self._objective.loss_on
        if self.arm == "paper" and masks != (0.85, "all"):
            yield (
                f"the branch hides {masks[0]} and has its loss on {masks[1]!r} pixels; the paper's released code hides "
                "0.85 and has it on 'all': branch=dict(mask_ratio=0.85, loss_on='all')"
            )

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Adapt to the frame that is about to be predicted."""
        self._totals.frames += 1
        if self.arm == "fixed":
            return
        try:
            self._before_frame(runner, batch_idx, data_batch)
        except BaseException:
            self._give_back()
            raise

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Put the source weights back after the last frame, before other hooks swap theirs back."""
        self._statistics.close()
        drift = None if self._adapter is None else self._adapter.drift
        if drift is not None:
            self._totals.drifts, self._totals.drift = self._totals.drifts + 1, self._totals.drift + drift
            runner.message_hub.update_scalar("ttt/drift", drift)
            runner.visualizer.add_scalars({"ttt/drift": drift}, step=self._totals.frames)
        if batch_idx + 1 == len(runner.test_dataloader):
            self._detach()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Log the sums over all processes."""
        self._totals.videos = self._order.videos
        summary = {"arm": self.arm, **self._totals.gathered().summary(adapted=self.arm != "fixed")}
        runner.message_hub.update_info("test/ttt", summary)
        runner.logger.info("test-time training: " + ", ".join(f"{name} {value}" for name, value in summary.items()))

    def after_test(self, runner: Any) -> None:
        """Give the model back."""
        self._give_back()

    # ---- one frame

    def _before_frame(self, runner: Any, batch_idx: int, data_batch: Any) -> None:
        sample = only_sample(data_batch)
        info = {**(self._infos[batch_idx] if self._infos else {}), **sample.metainfo}
        new = self._follow(runner, self._order, info)
        x, self._data = prepared(self._preprocessor, data_batch)
        adapter = self._attached(runner)
        if new:
            adapter.reset()
            self._size = (x.shape[2], x.shape[3])
            if self.arm == "offline":
                self._fit_video(runner, adapter, batch_idx, info)
        if self._size != (x.shape[2], x.shape[3]):
            raise FrameError(
                f"{file_of(info)} has (H, W) = {(x.shape[2], x.shape[3])} as the model takes it, and video "
                f"{video_of(info)!r} began with {self._size}: resize all frames of a video to one size in the test "
                "pipeline (Resize with keep_ratio=False), or give the frames another video_id"
            )
        if self.arm != "offline":
            report = self._adapt(adapter, x, info)
            self._record(runner, report, self._totals.frames, f"frame {batch_idx + 1}/{len(runner.test_dataloader)}")
        if (
            self._objective is not None
            and self.visualize_interval
            and self._totals.frames % self.visualize_interval == 0
        ):
            image = reconstruction_picture(self._objective, x, self._preprocessor, self.config.seed)
            runner.visualizer.add_image("ttt_reconstruction", image, step=self._totals.frames)
        self._statistics.enter_context(adapter.statistics())  # the loop predicts the frame; `after_test_iter` ends it

    def _fit_video(self, runner: Any, adapter: StreamAdapter, begin: int, info: Mapping[str, Any]) -> None:
        """Arm "offline": adapt to all frames of the video that begins at position `begin` of the stream.

        Source: "Test-Time Training on Video Streams", section 6.1. The model sees all frames in random order, for a
        fixed number of steps.
        """
        name = video_of(self._infos[begin])
        indices = [index for index, other in zip(self._indices, self._infos, strict=True) if video_of(other) == name]
        loader = runner.test_dataloader
        order = chain.from_iterable(shuffled_epochs(len(indices), self.config.seed))
        for step, i in enumerate(islice(order, self.offline_steps), start=1):
            batch = loader.collate_fn([loader.dataset[indices[i]]])
            found = {**info, **only_sample(batch).metainfo}
            x, self._data = prepared(self._preprocessor, batch)
            report = self._adapt(adapter, x, found)
            self._record(runner, report, self._totals.losses + 1, f"{name}, step {step}/{self.offline_steps}")

    def _adapt(self, adapter: StreamAdapter, x: Tensor, info: Mapping[str, Any]) -> StepReport:
        try:
            return adapter.adapt(x)
        except (FrameError, FrameTypeError) as error:
            raise FrameError(f"{file_of(info)}: {error}") from error

    def _record(self, runner: Any, report: StepReport, step: int, where: str) -> None:
        self._totals.ms += report.ms
        scalars = {"ttt/ms": report.ms}
        if report.losses:
            scalars["ttt/loss"] = report.losses[0]
            self._totals.losses += 1
            self._totals.loss += report.losses[0]
        for name, value in scalars.items():
            runner.message_hub.update_scalar(name, value)
        runner.visualizer.add_scalars(scalars, step=step)
        if step % self.log_interval == 0:
            text = "  ".join(f"{name}: {value:.4f}" for name, value in scalars.items())
            runner.logger.info(f"TTT {self.arm}, {where}  {text}" + (f"  ({report.reason})" if report.reason else ""))

    # ---- the model

    def _attached(self, runner: Any) -> StreamAdapter:
        """The adapter of this run. It is made at the first frame, after other hooks have swapped weights."""
        if self._adapter is None:
            model, found = self._model, self._calibration
            if self.stills and self.config.norm_stats in ("auto", "calibrated") and not fits(found, model):
                found = made_calibration(runner, self._objective or find_branch(runner.model), self.stills)
            config = self.config
            if found is not None and self.arm == "online":
                config = stream_config(self.arm, {**found.settings_beside(self._given), **self._given})
            if self.arm == "offline":
                config = config.replace(guards=False, on_cut="keep")  # frames in random order are no camera's
            self._adapter = StreamAdapter(
                model, self._objective, config=config, calibration=found, predict=self._predict_current
            )
        return self._adapter

    def _predict_current(self, x: Tensor) -> Any:
        """The prediction of the frame that the adapter asks for: it is always the one that came last."""
        return predicted(self._model, x, self._data)

    def _detach(self) -> None:
        self._statistics.close()
        if self._adapter is not None:
            self._adapter.detach()
            self._adapter = None

    def _give_back(self) -> None:
        self._detach()
        for module, training in self._flags.items():
            module.training = training
        self._flags = {}

    def _follow(self, runner: Any, order: FrameOrder, info: Mapping[str, Any]) -> bool:
        """Whether a video begins with this frame. A warning about missing frames comes once per video."""
        name, new, warning = order.follow(info)
        if warning and name not in self._warned:
            self._warned.add(name)
            runner.logger.warning(warning)
        return new
