"""stream_adapter: frames as cv2 reads them in, the samples of inference_model and inference_detector out."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import ttt_adapt_openmmlab  # noqa: F401  # before mmdet and mmseg: it stands in for operators that mmcv-lite lacks

# isort: split
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from torch import nn

import tiny
from conftest import photograph, same_bits
from small_configs import joint_config
from ttt_adapt import StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.errors import ConfigError, FrameError, StateError
from ttt_adapt_openmmlab import JointMAE, stream_adapter
from zoo import zoo_checkpoint

STILL = StreamConfig(lr=0.0, batch_size=2, window=2)
MOVING = StreamConfig(lr=1e-2, batch_size=2, window=2)
FRAME = (90, 140)  # not the size that the model sees, and no multiple of anything

MODELS: dict[str, Any] = {
    "fcn": tiny.fcn,
    "sliding": lambda: {**tiny.fcn(), "test_cfg": {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}},
    "semantic": tiny.mask2former_semantic,
    "instance": tiny.mask2former,
    "panoptic": lambda: tiny.mask2former(2, 2),
}


def pipeline(scope: str, *extra: dict) -> list[dict]:
    """As the projects' configs write it, annotations included."""
    load = {"type": "LoadAnnotations"}
    if scope == "mmdet":
        load |= {"with_bbox": True, "with_mask": True}
    resize = {"type": "Resize", "scale": (96, 64), "keep_ratio": True}
    pack = {"type": "PackSegInputs" if scope == "mmseg" else "PackDetInputs"}
    return [{"type": "LoadImageFromFile"}, resize, load, *extra, pack]


def config(model: dict, *extra: dict) -> Config:
    scope = tiny.scope_of(model)
    steps = pipeline(scope, *extra)
    dataset = {"type": "CityscapesDataset" if scope == "mmseg" else "CocoDataset", "pipeline": steps}
    return Config(
        {"model": model, "default_scope": scope, "test_pipeline": steps, "test_dataloader": {"dataset": dataset}}
    )


def initialised(cfg: Config, checkpoint: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    if cfg.default_scope == "mmseg":
        return init_model(cfg, checkpoint, device="cpu")
    return init_detector(cfg, checkpoint, device="cpu")


def inference(cfg: Config) -> Any:
    return inference_model if cfg.default_scope == "mmseg" else inference_detector


def predictions(sample: Any) -> dict:
    return {key: value for key, value in tiny.tensors(sample).items() if key.startswith(("pred_", "seg_logits"))}


def plain(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, JointMAE) else model


def joined(model: dict, cfg: Config) -> Config:
    """The config of a JointMAE, as it looks when it inherits from the plain model's config."""
    cfg = Config(cfg.to_dict())
    cfg.model = {**model, "type": "JointMAE", "model": model, "branch": {"decoder": "copy_head"}}
    return cfg


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "joint"])
@pytest.mark.parametrize("kind", MODELS)
def test_with_lr_0_a_step_gives_what_inference_gives_bitwise(kind, wrapped):
    cfg = config(MODELS[kind]())
    if wrapped:
        cfg = joined(MODELS[kind](), cfg)
    model = initialised(cfg)
    frames = [tiny.frame(FRAME, seed) for seed in range(3)]
    expected = [inference(cfg)(model, frame) for frame in frames]
    with stream_adapter(model, config=STILL) as adapter:
        assert isinstance(adapter, StreamAdapter)
        got = [adapter.step(frame) for frame in frames]
        assert adapter.last.adapted
    for a, b in zip(expected, got, strict=True):
        assert type(a) is type(b)
        assert a.metainfo == b.metainfo
        assert len(predictions(a)) >= 2
        assert same_bits(predictions(a), predictions(b))
    assert not same_bits(predictions(got[0]), predictions(got[1]))


def test_the_model_adapts_and_comes_back_as_it_was():
    cfg = config(tiny.fcn())
    model = initialised(joined(tiny.fcn(), cfg))
    before = photograph(model)
    frames = [tiny.frame(FRAME, seed) for seed in range(3)]
    fixed = inference_model(model, frames[-1])
    with stream_adapter(model, config=MOVING) as adapter:
        moved = [adapter.step(frame) for frame in frames][-1]
        adapter.reset()
        again = [adapter.step(frame) for frame in frames][-1]
    assert not same_bits(predictions(fixed), predictions(moved))
    assert same_bits(predictions(moved), predictions(again))
    assert photograph(model) == before


def test_pipeline_and_preprocessor_run_once_per_frame(monkeypatch):
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    calls = []
    kind = type(model.data_preprocessor)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: (calls.append(1), original(self, *a, **k))[1])
    from mmcv.transforms import Resize

    resizes = []
    transform = Resize.transform
    monkeypatch.setattr(Resize, "transform", lambda self, data: (resizes.append(1), transform(self, data))[1])
    with stream_adapter(model, config=MOVING) as adapter:
        for seed in range(3):
            adapter.step(tiny.frame(FRAME, seed))
    assert (len(calls), len(resizes)) == (3, 3)


def test_frames_are_bgr_as_inference_model_takes_them():
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    frame = tiny.frame(FRAME)
    with stream_adapter(model, config=STILL) as adapter:
        expected, swapped = adapter.step(frame), adapter.predict(frame[..., ::-1])
        as_tensor = adapter.predict(torch.from_numpy(frame))
    assert not same_bits(predictions(expected), predictions(swapped))
    assert same_bits(predictions(expected), predictions(as_tensor))


def test_adapting_to_one_frame_and_predicting_another_do_not_mix():
    cfg = config(tiny.fcn())
    model = initialised(joined(tiny.fcn(), cfg))
    first, second = tiny.frame(FRAME, 1), tiny.frame((60, 140), 2)
    expected = inference_model(model, second)
    with stream_adapter(model, config=STILL) as adapter:
        adapter.adapt(first)
        got = adapter.predict(second)
    assert got.pred_sem_seg.shape == second.shape[:2] != first.shape[:2]
    assert same_bits(predictions(expected), predictions(got))


@pytest.mark.parametrize("statistics", ["batch", "ema", "blend"])
def test_statistics_that_move_predict_the_frame_all_the_same(statistics):
    """With "ema" the model predicts each frame twice, on data samples of their own."""
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    fixed = inference_model(model, tiny.frame(FRAME))
    settings = StreamConfig(lr=0.0, batch_size=1, window=1, norm_stats=statistics)
    with stream_adapter(model, config=settings) as adapter:
        a = adapter.step(tiny.frame(FRAME))
        b = adapter.predict(tiny.frame(FRAME))
    assert same_bits(predictions(a), predictions(b))
    assert not same_bits(predictions(a), predictions(fixed))


def test_frames_that_are_taken_in_turns_keep_their_own_data():
    """Predictions depend on nothing that an earlier or a later frame left behind."""
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    first, second = tiny.frame(FRAME, 1), tiny.frame((60, 93), 2)  # as the model takes them both are (64, 96)
    expected = [inference_model(model, frame) for frame in (first, second)]
    with stream_adapter(model, config=STILL) as adapter:
        got = [adapter.step(first), adapter.predict(second), adapter.predict(first), adapter.step(second)]
    for sample, frame in zip(got, (0, 1, 0, 1), strict=True):
        assert sample.pred_sem_seg.shape == expected[frame].pred_sem_seg.shape
        assert same_bits(predictions(sample), predictions(expected[frame]))


@pytest.mark.parametrize("kind", ["fcn", "instance"])
def test_a_zoo_checkpoint_loads_into_plain_and_joint_models(tmp_path, kind):
    model = MODELS[kind]()
    trained = tiny.changed(tiny.build(model))
    path = str(tmp_path / "zoo.pth")
    torch.save(zoo_checkpoint(trained.state_dict()), path)
    for cfg in (config(model), joined(model, config(model))):
        loaded = initialised(cfg, path)
        assert same_bits(dict(trained.state_dict()), dict(plain(loaded).state_dict()))
        assert tuple(loaded.dataset_meta["classes"]) == ("road", "sidewalk", "building", "wall")
        with stream_adapter(loaded, config=STILL) as adapter:
            adapter.step(tiny.frame(FRAME))


def test_a_trained_branch_comes_with_the_file_of_the_joint_run(tmp_path):
    model = tiny.fcn()
    trained = tiny.changed(JointMAE(tiny.build(model), {"decoder": "copy_head"}))
    path = str(tmp_path / "joint.pth")
    torch.save({"state_dict": trained.state_dict(), "meta": {"dataset_meta": {"classes": tuple("abcd")}}}, path)
    wrapped, stock = initialised(joined(model, config(model)), path), initialised(config(model), path)
    with (
        stream_adapter(wrapped, config=MOVING) as a,
        stream_adapter(stock, config=MOVING, decoder="copy_head", checkpoint=path) as b,
    ):
        assert same_bits(dict(a.branch.state_dict()), dict(b.branch.state_dict()))
        for seed in range(2):
            got, expected = a.step(tiny.frame(FRAME, seed)), b.step(tiny.frame(FRAME, seed))
            assert same_bits(predictions(got), predictions(expected))
        assert a.last.losses == b.last.losses


def test_the_config_of_the_page_is_built_by_init_model_and_init_detector(tmp_path):
    for name, model in (("a", tiny.fcn()), ("b", tiny.mask2former())):
        folder = tmp_path / name
        folder.mkdir()
        cfg = joint_config(folder, model)
        extra = config(model)
        for key in ("default_scope", "test_pipeline", "test_dataloader"):
            cfg[key] = extra[key]
        built = initialised(cfg)
        assert isinstance(built, JointMAE)
        with stream_adapter(built, config=STILL) as adapter:
            adapter.step(tiny.frame(FRAME))


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"type": "RandomFlip", "prob": 0.5}, "RandomFlip"),
        ({"type": "RandomResize", "scale": (96, 64), "ratio_range": (0.5, 2.0)}, "RandomResize"),
        ({"type": "TestTimeAug", "transforms": []}, "TestTimeAug"),
    ],
)
@pytest.mark.parametrize("model", [tiny.fcn, tiny.mask2former])
def test_a_test_pipeline_that_changes_frames_at_random_is_refused(model, extra, name):
    cfg = config(model())
    built = initialised(cfg)
    built.cfg = config(model(), extra)
    before = photograph(built)
    with pytest.raises(ConfigError, match=f"{name}.*take it out"):
        stream_adapter(built)
    assert photograph(built) == before


def test_a_flip_that_never_happens_is_allowed():
    built = initialised(config(tiny.fcn()))
    built.cfg = config(tiny.fcn(), {"type": "RandomFlip", "prob": 0.0})
    stream_adapter(built, config=STILL).detach()


def misfits(cfg: Config) -> dict[str, tuple[Any, str]]:
    def model(change: Any = None, **settings: Any) -> nn.Module:
        built = initialised(cfg)
        if change:
            change(built)
        return stream_adapter(built, **settings)

    def first_is_not_an_image(built: nn.Module) -> None:
        built.cfg = Config({"test_pipeline": [{"type": "Resize", "scale": (96, 64)}]})

    def no_pipeline(built: nn.Module) -> None:
        built.cfg = Config({})

    return {
        "no config": (functools.partial(model, lambda built: delattr(built, "cfg")), "no config.*init_model"),
        "no pipeline": (functools.partial(model, no_pipeline), "begins with nothing"),
        "no image": (functools.partial(model, first_is_not_an_image), "begins with Resize"),
        "no preprocessor": (
            functools.partial(model, lambda built: delattr(built, "data_preprocessor")),
            "no data_preprocessor",
        ),
        "unknown keyword": (functools.partial(model, mask_rato=0.8), "mask_rato"),
        "unknown encoder": (functools.partial(model, encoder="back"), "no module 'back'"),
    }


@pytest.mark.parametrize(
    "case", ["no config", "no pipeline", "no image", "no preprocessor", "unknown keyword", "unknown encoder"]
)
def test_models_that_cannot_stream_are_refused_with_what_to_do(case):
    call, message = misfits(config(tiny.fcn()))[case]
    with pytest.raises(TTTAdaptError, match=message):
        call()


def test_a_branch_and_settings_of_another_are_refused_together():
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    with pytest.raises(ConfigError, match="decoder: settings of a new branch"):
        stream_adapter(model, model.branch, decoder="conv")


def test_a_model_takes_one_adapter_at_a_time():
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    with stream_adapter(model, config=STILL), pytest.raises(StateError, match="already has"):
        stream_adapter(model, config=STILL)


USES: dict[str, Any] = {
    "step": lambda adapter, frame: adapter.step(frame),
    "step with an array": lambda adapter, frame: adapter.step(frame.numpy()),
    "predict": lambda adapter, frame: adapter.predict(frame),
    "stream": lambda adapter, frame: list(adapter.stream([frame])),
}


@pytest.mark.parametrize("use", USES)
def test_a_float_frame_is_refused_and_changes_nothing(use):
    model = initialised(joined(tiny.fcn(), config(tiny.fcn())))
    with stream_adapter(model, config=MOVING) as adapter:
        adapter.step(tiny.frame(FRAME))
        before, report, state = photograph(model), adapter.last, copy.deepcopy(adapter.state_dict())
        with pytest.raises(FrameError, match=r"float32 frame \(1, 3, 64, 96\).*uint8 BGR"):
            USES[use](adapter, torch.randn(1, 3, *tiny.SIZE))
        assert photograph(model) == before
        assert adapter.last is report
        assert same_bits(adapter.state_dict(), state)


def test_videos_from_files_are_read_as_opencv_reads_them(tmp_path: Path):
    import cv2

    cfg = config(tiny.fcn())
    model = initialised(joined(tiny.fcn(), cfg))
    path = str(tmp_path / "frame.png")
    cv2.imwrite(path, tiny.frame(FRAME))
    expected = inference_model(model, cv2.imread(path))
    with stream_adapter(model, config=STILL) as adapter:
        assert same_bits(predictions(adapter.step(cv2.imread(path))), predictions(expected))
