"""calibrate on models of mmseg and mmdet: measured, saved, and used by stream_adapter and in the test loop."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from torch import nn

import tiny
import videos as v
from conftest import left_as_it_was, photograph, same_bits, settle_norms
from test_stream import FRAME, MODELS, config, initialised, joined, predictions
from ttt_adapt import Calibration, StreamConfig
from ttt_adapt.data.drift import Drift
from ttt_adapt.errors import CheckpointError, ConfigError, DataError, FrameError
from ttt_adapt_openmmlab import JointMAE, OnlineTTTHook, calibrate, find_branch, plain_model, stream_adapter

STILLS = [tiny.frame(FRAME, seed) for seed in range(16)]
DARK = (tiny.frame(FRAME) // 8).astype(np.uint8)
CALIBRATED = StreamConfig(norm_stats="calibrated")


def settled(model: nn.Module) -> nn.Module:
    """The model with running statistics of the stills, as after a training on them."""
    plain = plain_model(model)
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            plain(plain.data_preprocessor(tiny.batch(tiny.fcn(), len(STILLS)), False)["inputs"])
    for norm in norms:
        norm.eval()
    return model


def with_rule(found: Calibration, **changes: Any) -> Calibration:
    return found.replace(rule=dataclasses.replace(found.rule, **changes))


@pytest.mark.parametrize("kind", ["semantic", "instance"])
def test_points_are_in_backbone_and_pixel_decoder_and_queries_are_none(kind):
    """Queries have no place in the image: what they have in common is no statistic of it."""
    model = initialised(config(MODELS[kind](queries=5)))
    found = calibrate(model, STILLS, choose=False)
    norms, blocks = set(found.statistics["norms"]), set(found.statistics["blocks"])
    assert {"backbone.patch_embed.norm", "backbone.stages.2.blocks.0.norm1", "backbone.norm3"} <= norms
    assert {f"backbone.stages.{i}.blocks.0" for i in range(4)} <= blocks
    head = "decode_head" if kind == "semantic" else "panoptic_head"
    assert {f"{head}.pixel_decoder.input_convs.0.gn", f"{head}.pixel_decoder.output_convs.0.gn"} <= norms
    assert not [name for name in norms | blocks if "transformer_decoder" in name]
    assert {each.prefix for points in found.statistics.values() for each in points.values()} == {0}
    assert found.rule.points == "blocks"


@pytest.mark.parametrize("size", [(90, 140), (62, 93)])
def test_no_token_is_taken_for_a_class_token_where_the_backbone_pads(size):
    plain = {**tiny.mask2former(queries=5), "data_preprocessor": tiny.det_preprocessor(pad_size_divisor=1)}
    cfg = config(plain)
    cfg.test_dataloader.dataset.pipeline[1].scale = size[::-1]
    found = calibrate(initialised(cfg), STILLS, choose=False)
    assert found.size not in ((64, 96), (96, 64))
    assert {each.prefix for points in found.statistics.values() for each in points.values()} == {0}
    assert set(found.statistics["blocks"]) >= {f"backbone.stages.{i}.blocks.0" for i in range(4)}


def test_batchnorm_of_backbone_and_heads_is_measured_at_its_input():
    found = calibrate(settled(initialised(config(tiny.fcn()))), STILLS, choose=False)
    assert found.rule.points == "batchnorm"
    assert {"backbone.bn1", "backbone.layer4.1.bn2", "decode_head.convs.0.bn"} <= set(found.statistics["batchnorm"])
    assert not [name for name in found.statistics["batchnorm"] if "auxiliary" in name]  # no prediction calls it
    assert found.stills == 16
    assert found.size == tiny.SIZE


@pytest.mark.parametrize("kind", MODELS)
def test_frames_within_the_margin_are_predicted_as_by_the_plain_model_bitwise_and_others_are_not(kind):
    model = settled(initialised(config(MODELS[kind]())))
    with left_as_it_was(model):
        found = calibrate(model, STILLS, choose=False)
    with stream_adapter(model, config=StreamConfig(lr=0.0)) as adapter:
        usual, dark = predictions(adapter.predict(STILLS[0])), predictions(adapter.predict(DARK))
    with left_as_it_was(model), stream_adapter(model, calibration=with_rule(found, strength=1e9)) as adapter:
        assert same_bits(predictions(adapter.step(STILLS[0])), usual)
        assert same_bits(predictions(adapter.step(DARK)), dark)
        assert adapter.last.reason == "no branch"
    with left_as_it_was(model), stream_adapter(model, calibration=found) as adapter:
        assert not same_bits(predictions(adapter.step(DARK)), dark)
        far = adapter.drift
        adapter.step(STILLS[0])
        assert far > 2 * adapter.drift > 0


def test_a_model_that_goes_over_the_frame_in_windows_is_measured_in_every_window():
    """The statistics of BatchNorm's input in windows are those of the windows, and not of the whole frame."""
    found = calibrate(settled(initialised(config(MODELS["sliding"]()))), STILLS, choose=False)
    whole = calibrate(settled(initialised(config(MODELS["fcn"]()))), STILLS, choose=False)
    assert found.statistics["batchnorm"].keys() == whole.statistics["batchnorm"].keys()
    windows, frames = (each.statistics["batchnorm"]["backbone.bn1"].usual for each in (found, whole))
    assert not torch.equal(windows, frames)


def test_files_and_arrays_are_the_same_images(tmp_path: Path):
    model = settled(initialised(config(tiny.fcn())))
    for i, still in enumerate(STILLS):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), still)
    files = calibrate(model, sorted(tmp_path.glob("*.png")), choose=False)
    arrays = calibrate(model, STILLS, choose=False)
    tensors = calibrate(model, map(torch.from_numpy, STILLS), choose=False)
    model.cfg.test_pipeline[0] = {"type": "LoadPicture"}
    pictures = calibrate(model, sorted(tmp_path.glob("*.png")), choose=False)
    assert files.digest == arrays.digest == tensors.digest == pictures.digest


def test_drifts_of_the_choice_are_those_of_rgb_frames(monkeypatch):
    seen = []
    apply = Drift.apply
    monkeypatch.setattr(Drift, "apply", lambda self, frame, index: (seen.append(frame), apply(self, frame, index))[1])
    calibrate(settled(initialised(config(tiny.fcn()))), STILLS, drifts=["night:3"])
    assert [any(np.array_equal(frame, still[..., ::-1]) for still in STILLS) for frame in seen] == [True] * 8


@pytest.mark.parametrize("kind", ["fcn", "semantic", "instance", "panoptic"])
def test_the_rule_is_chosen_by_how_little_a_drift_moves_predictions(kind):
    model = settled(initialised(config(MODELS[kind]())))
    with left_as_it_was(model):
        found = calibrate(model, STILLS, drifts=["night:5"])
    assert found.record["by"] == "agreement"
    plain = found.record["candidates"][0]["scores"]
    assert plain["none"] == pytest.approx(1.0)
    assert 0.0 < plain["night:5"] < 1.0


def test_labels_make_the_choice_of_a_segmentor():
    model = settled(initialised(config(tiny.fcn())))
    labels = [np.zeros(FRAME, np.uint8) for _ in STILLS]
    found = calibrate(model, STILLS, labels, drifts=["night:3"])
    assert found.record["by"] == "labels"


def test_a_joint_model_keeps_its_calibration_and_saves_it_with_the_weights(tmp_path):
    model = settled(initialised(joined(tiny.fcn(), config(tiny.fcn()))))
    assert "mae_calibration" not in model.state_dict()
    found = calibrate(model, STILLS, choose=False)
    assert model.branch.calibration is found
    assert found.loss[0] > 0
    path = str(tmp_path / "joint.pth")
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": tuple("abcd")}}}, path)
    assert torch.load(path, weights_only=True)["state_dict"]["mae_calibration"].dtype == torch.uint8
    again = initialised(joined(tiny.fcn(), config(tiny.fcn())), path)
    assert again.branch.calibration.digest == found.digest
    stock = initialised(config(tiny.fcn()), path)
    assert same_bits(dict(stock.state_dict()), dict(plain_model(model).state_dict()))
    with (
        stream_adapter(again, config=StreamConfig.online(batch_size=1)) as a,
        stream_adapter(stock, config=StreamConfig.online(batch_size=1), decoder="copy_head", checkpoint=path) as b,
    ):
        assert (a.config.norm_stats, b.config.norm_stats) == ("calibrated", "calibrated")
        assert same_bits(predictions(a.step(DARK)), predictions(b.step(DARK)))
        assert a.last.adapted
    again.load_state_dict(JointMAE(tiny.build(tiny.fcn()), {"decoder": "copy_head"}).state_dict())
    assert again.branch.calibration is None


def test_a_training_pass_removes_the_calibration_and_a_prediction_does_not():
    model = settled(initialised(joined(tiny.fcn(), config(tiny.fcn()))))
    calibrate(model, STILLS, choose=False)
    batch = model.data_preprocessor(tiny.batch(tiny.fcn()), training=True)
    model(**batch, mode="predict")
    assert model.branch.calibration is not None
    model(**batch, mode="loss")
    assert model.branch.calibration is None


def test_a_file_round_trip_gives_the_same_predictions(tmp_path):
    model = settled(initialised(config(tiny.mask2former_semantic())))
    found = calibrate(model, STILLS, choose=False)
    found.save(tmp_path / "camera.safetensors")
    loaded = Calibration.load(tmp_path / "camera.safetensors")
    with stream_adapter(model, calibration=found) as a:
        expected = predictions(a.step(DARK))
    with stream_adapter(model, calibration=loaded) as b:
        assert same_bits(predictions(b.step(DARK)), expected)


def test_a_joint_model_with_a_calibration_takes_gradient_steps_too():
    model = settled(initialised(joined(tiny.fcn(), config(tiny.fcn()))))
    found = calibrate(model, STILLS, choose=False)
    model.branch.calibration = None
    with stream_adapter(model, calibration=found) as adapter:
        adapter.step(DARK)
        assert adapter.last.adapted
        assert adapter.drift > 1


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (STILLS[:3], ConfigError, "got 3 stills; expected at least 8"),
        ([*STILLS, np.zeros((90, 140), np.uint8)], FrameError, r"still 16.*expected \[H, W, 3\]"),
        ([torch.rand(3, *tiny.SIZE)] * 8, FrameError, "float32 frame"),
        (["absent.png"], FileNotFoundError, r"absent\.png"),
        ([__file__], FrameError, "cannot be decoded"),
    ],
)
def test_images_that_cannot_be_used_are_named_and_nothing_changes(images, error, message):
    model = settled(initialised(joined(tiny.fcn(), config(tiny.fcn()))))
    before = photograph(model)
    with pytest.raises(error, match=message):
        calibrate(model, images)
    assert photograph(model) == before
    assert model.branch.calibration is None


def test_a_calibration_of_other_weights_is_refused():
    model = settled(initialised(config(tiny.fcn())))
    found = calibrate(model, STILLS, choose=False)
    tiny.changed(model)
    with pytest.raises(ConfigError, match="other weights"):
        stream_adapter(model, calibration=found)


def test_a_model_without_config_is_refused():
    model = initialised(config(tiny.fcn()))
    del model.cfg
    with pytest.raises(ConfigError, match=r"no config in \.cfg"):
        calibrate(model, STILLS)


# ---- in the runner


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return v.write_videos(tmp_path_factory.mktemp("data"), {"a": 6, "b": 6})


@pytest.fixture
def make(root, tmp_path, monkeypatch):
    """A runner with the hook under test, and a training set."""
    tiny.without_slow_logs(monkeypatch)

    def runner(hook=None, model=None, **changes):
        hooks = [] if hook is None else [hook]
        entries = {"train_dataloader": v.loader_of(root), "model": model or v.joint_model(), **changes}
        cfg = Config(v.seg_config(root, tmp_path / "work", custom_hooks=hooks))
        made = Runner.from_cfg(Config({**cfg.to_dict(), **v.train_entries(root), **entries}))
        settle_norms(plain_model(made.model))
        return made

    return runner


def first_images(root: Path, count: int) -> dict[str, Any]:
    """A loader of the first images only."""
    loader = v.loader_of(root)
    loader["dataset"]["indices"] = count
    return loader


def outputs(runner: Runner) -> list[torch.Tensor]:
    """The logits of all frames of a test run."""
    found = []
    after = runner.hooks[-1].after_test_iter
    runner.hooks[-1].after_test_iter = lambda runner, batch_idx, data_batch=None, outputs=None: (
        found.extend(sample.seg_logits.data.clone() for sample in outputs),
        after(runner, batch_idx, data_batch, outputs),
    )
    runner.test()
    return found


def test_the_hook_calibrates_on_the_training_set_and_predicts_with_it(make):
    runner = make(v.hook(arm="calibrated", stills=9), copy.deepcopy(v.MODEL))
    with left_as_it_was(runner.model, "training"):
        found = outputs(runner)
    assert not same_bits(found, outputs(make(None, copy.deepcopy(v.MODEL))))
    summary = runner.message_hub.get_info("test/ttt")
    assert summary["arm"] == "calibrated"
    assert summary["mean_drift"] > 0
    assert len(runner.message_hub.get_scalar("ttt/drift").data[0]) == 12


def test_predictions_are_those_of_a_stream_adapter_with_the_same_calibration(make, root, tmp_path):
    model = make(None).model
    images = sorted(Path(root, "images").rglob("*.png"))
    cfg = v.seg_config(root, tmp_path)
    found = calibrate(model, images, cfg=Config(cfg), choose=False)
    found.save(tmp_path / "calibration.safetensors")
    runner = make(v.hook(calibration=str(tmp_path / "calibration.safetensors")))
    runner.model.load_state_dict(model.state_dict())
    runner.model.branch.calibration = None
    got = outputs(runner)
    model.cfg = Config(cfg)
    expected = []
    settings = StreamConfig.online(window=2, batch_size=2, lr=0.01)
    with stream_adapter(model, config=settings, calibration=found) as adapter:
        for path in images:
            if path.name == "000000.png":
                adapter.reset()
            expected.append(adapter.step(cv2.imread(str(path))).seg_logits.data)
    assert same_bits(got, expected)
    assert not same_bits(got, outputs(make(v.hook())))


@pytest.mark.parametrize("statistics", ["blend", "batch"])
def test_other_statistics_of_a_frame_are_those_that_the_loop_predicts_with_too(make, statistics):
    assert not same_bits(outputs(make(v.hook(lr=0.0, norm_stats=statistics))), outputs(make(None)))


def test_the_last_checkpoint_of_a_training_run_holds_the_calibration_and_the_test_run_uses_it(make, tmp_path):
    runner = make(v.hook(stills=9))
    runner.train()
    checkpoint = torch.load(tmp_path / "work" / "iter_2.pth", weights_only=True)
    assert "mae_calibration" in checkpoint["state_dict"]
    trained = find_branch(runner.model).calibration
    other = make(v.hook())
    other.load_checkpoint(str(tmp_path / "work" / "iter_2.pth"))
    assert find_branch(other.model).calibration.digest == trained.digest
    other.test()
    assert other.message_hub.get_info("test/ttt")["mean_drift"] > 0


def test_weights_that_an_ema_hook_saves_are_calibrated_in_the_test_run(make, tmp_path):
    runner = make(v.hook(stills=9))
    runner.register_hook(EMAHook())
    runner.train()
    assert "mae_calibration" not in torch.load(tmp_path / "work" / "iter_2.pth", weights_only=True)["state_dict"]
    runner.test()
    assert runner.message_hub.get_info("test/ttt")["mean_drift"] > 0


def test_frozen_statistics_need_no_calibration_and_make_none(make):
    runner = make(v.hook(stills=9, norm_stats="frozen"))
    runner.test()
    assert find_branch(runner.model).calibration is None
    assert "mean_drift" not in runner.message_hub.get_info("test/ttt")


def test_a_run_without_what_it_calibrates_by_is_refused(make, root, tmp_path):
    plain = copy.deepcopy(v.MODEL)
    with pytest.raises(ConfigError, match="arm 'calibrated' needs a calibration.*stills=40"):
        make(v.hook(arm="calibrated"), plain).test()
    nothing = {"train_dataloader": None, "train_cfg": None, "optim_wrapper": None}
    with pytest.raises(ConfigError, match="no train_dataloader"):
        make(v.hook(arm="calibrated", stills=9), plain, **nothing).test()
    with pytest.raises(ConfigError, match="found 4 images of 48 x 64 .*expected at least 8"):
        make(v.hook(arm="calibrated", stills=9), plain, train_dataloader=first_images(root, 4)).test()
    with pytest.raises(CheckpointError, match="there is no calibration"):
        make(v.hook(calibration=str(tmp_path / "absent.safetensors"))).test()
    for wrong in (-1, 4, True):
        with pytest.raises(ConfigError, match=f"stills is {wrong}"):
            OnlineTTTHook(stills=wrong)


def test_a_training_run_that_could_not_calibrate_at_its_end_is_refused_at_its_beginning(make, root):
    runner = make(v.hook(stills=9), train_dataloader=first_images(root, 4))
    with pytest.raises(ConfigError, match="found 4 images"):
        runner.train()
    assert runner.iter == 0


def test_a_calibration_of_other_weights_is_refused_in_the_test_run_and_renewed_by_stills(make, root, tmp_path):
    runner = make(v.hook())
    calibrate(runner.model, sorted(Path(root, "images").rglob("*.png")), cfg=runner.cfg, choose=False)
    found = find_branch(runner.model).calibration
    tiny.changed(plain_model(runner.model))
    with pytest.raises(ConfigError, match="other weights"):
        runner.test()
    renewed = make(v.hook(stills=9))
    find_branch(renewed.model).calibration = found
    tiny.changed(plain_model(renewed.model))
    renewed.test()
    assert find_branch(renewed.model).calibration.digest != found.digest


def test_images_of_another_size_are_left_out(root, make, tmp_path):
    for name in ("images", "labels"):
        mode = {"images": (30, 40, 3), "labels": (30, 40)}[name]
        for folder in ("a", "b"):
            for file in sorted(Path(root, name, folder).glob("*.png")):
                (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / folder / file.name).write_bytes(file.read_bytes())
        cv2.imwrite(str(tmp_path / name / "a" / "odd.png"), np.zeros(mode, np.uint8))
    runner = make(v.hook(arm="calibrated", stills=40), v.MODEL, train_dataloader=v.loader_of(tmp_path))
    runner.test()
    assert runner.message_hub.get_info("test/ttt")["mean_drift"] > 0
    (tmp_path / "images" / "a" / "odd.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="odd.png"):
        make(v.hook(arm="calibrated", stills=40), v.MODEL, train_dataloader=v.loader_of(tmp_path)).test()
