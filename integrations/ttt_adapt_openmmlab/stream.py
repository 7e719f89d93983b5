"""stream_adapter: a segmentor or detector in a script that adapts to the frames that it gets."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from ttt_adapt import Calibration, MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import ConfigError, FrameError
from ttt_adapt_openmmlab.decoders import branch_settings
from ttt_adapt_openmmlab.frames import NO_IMAGE, Frames
from ttt_adapt_openmmlab.joint import find_branch, plain_model
from ttt_adapt_openmmlab.stream_branch import branch_for_stream


def stream_adapter(
    model: nn.Module,
    branch: MAEBranch | None = None,
    *,
    config: StreamConfig | None = None,
    calibration: Calibration | None = None,
    **attach: Any,
) -> StreamAdapter:
    """A `StreamAdapter` on what `init_model` or `init_detector` returns.

    `adapter.step(frame)` takes a frame as `cv2` reads it, uint8 BGR [H, W, 3], runs the config's test pipeline and the
    model's data preprocessor on it, adapts, and returns what `inference_model` or `inference_detector` returns for one
    image: a `SegDataSample` or `DetDataSample`. Call `adapter.reset()` where a new video begins.

    Args:
        model: a segmentor or detector with its config in `.cfg`, or a `JointMAE` around one.
        branch: a branch on the plain model; by default the branch of the `JointMAE`. A plain model without a
            `calibration` gets a new branch. Adapting with an untrained branch does not help, so name the file of a
            `JointMAE` run by `checkpoint=`.
        config: the choices of the algorithm; by default as in `StreamAdapter`.
        calibration: of the model, from `ttt_adapt_openmmlab.calibrate`; by default the branch's. A plain model with a
            calibration takes no gradient step: frames are corrected by calibrated statistics alone.
        **attach: keywords of `MAEBranch.attach` (`decoder`, `mask_ratio`, ...) for a new branch, and `checkpoint`.

    Raises:
        ConfigError: a model without config or data preprocessor, a test pipeline that is not one image in, one image
            out, an unknown keyword, or a calibration of other weights.
        EncoderError, CheckpointError: the branch cannot be attached, or the checkpoint is of another one.
        StateError: the model already has an adapter.
    """
    plain = plain_model(model)
    frames = Frames(plain, getattr(model, "cfg", None))
    if branch is not None and attach:
        raise ConfigError(
            f"{', '.join(attach)}: settings of a new branch came together with a branch; pass one or the other"
        )
    if branch is None and (attach or calibration is None or find_branch(model) is not None):
        new = bool(attach) or find_branch(model) is None
        keywords = branch_settings(attach, "checkpoint") if new else None
        branch = branch_for_stream(model, keywords, 0 if config is None else config.seed)
    return _ImageAdapter(
        plain, branch, config=config, calibration=calibration, preprocess=frames, predict=frames.predict
    )


class _ImageAdapter(StreamAdapter):
    """Refuses a float frame in `step` before it adapts to it, because it could not predict it."""

    def step(self, frame: Any) -> Any:
        if isinstance(frame, np.ndarray | Tensor) and "float" in str(frame.dtype):
            raise FrameError(NO_IMAGE.format(frame.dtype, tuple(frame.shape)))
        return super().step(frame)
