"""Colorization in MMEngine: what goes in, what comes out, and how it is scored; `test_configs` trains and tests it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import PixelData

import tiny
from ttt_adapt.data import unlabelled
from ttt_adapt.errors import DataError
from ttt_adapt.integration import rgb_to_lab, to_grey
from ttt_adapt_openmmlab import Colorizer, ColourPictures, JointMAE, PackColours, StreamColourMetric
from ttt_adapt_openmmlab.colorization import AB_SCALE
from ttt_adapt_openmmlab.decoders import MaskHeadCopy

SIZE = (64, 96)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def packed(seed: int = 0) -> dict:
    return PackColours().transform({"img": picture(seed)[..., ::-1], "img_path": "a.png", "img_shape": SIZE})


def colorizer() -> Colorizer:
    config = tiny.mask2former_semantic()
    parts = {name: config[name] for name in ("backbone", "decode_head", "data_preprocessor")}
    tiny.enter("mmseg")
    return MODELS.build(ConfigDict({"type": "Colorizer", **parts}))


def test_a_picture_is_packed_as_its_grey_and_its_colours():
    result = packed()
    assert np.array_equal(result["inputs"].permute(1, 2, 0).numpy(), to_grey(picture()))
    expected = rgb_to_lab(torch.from_numpy(picture()).permute(2, 0, 1).float() / 255)[1:]
    torch.testing.assert_close(result["data_samples"].gt_ab.data, expected)


def test_the_model_paints_a_and_b_and_learns_them_together_with_the_reconstruction():
    model = colorizer()
    assert model.decode_head.num_queries == 2 * 16
    joint = JointMAE(model, {"decoder": "copy_head", "image_size": SIZE})
    assert isinstance(joint.branch.decoder, MaskHeadCopy)
    batch = [packed(seed) for seed in range(2)]
    data = {name: [sample[name] for sample in batch] for name in ("inputs", "data_samples")}
    optimizer = torch.optim.AdamW(joint.parameters(), 1e-3)
    for _ in range(2):
        losses = joint(**joint.data_preprocessor(data, True), mode="loss")
        assert {"loss_mae", "d0.loss_ab"} <= losses.keys()
        total = joint.parse_losses(losses)[0]
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        assert model.backbone.patch_embed.projection.weight.grad.abs().sum() > 0
        optimizer.step()
    inputs = joint.eval().data_preprocessor(data, False)["inputs"]
    with torch.no_grad():
        assert model(inputs, mode="tensor").shape == (2, 2, *inputs.shape[2:])
        samples = joint(inputs, [sample["data_samples"] for sample in batch], mode="predict")
    assert samples[1].pred_ab.data.shape == (2, *SIZE)
    torch.testing.assert_close(
        samples[0].pred_ab.data, AB_SCALE * model(inputs, mode="tensor")[0, :, :64, :96].detach()
    )


def test_psnr_is_that_of_the_colours_on_the_frames_own_grey():
    metric = StreamColourMetric()
    sample = packed()["data_samples"]
    sample.pred_ab = PixelData(data=sample.gt_ab.data.clone())
    assert metric.score([metric.measure(sample.to_dict())])["PSNR"] == 100.0
    sample.pred_ab = PixelData(data=torch.zeros_like(sample.gt_ab.data))
    scores = metric.score([metric.measure(sample.to_dict())])
    assert scores["PSNR"] == pytest.approx(scores["PSNR_grey"])
    truth, grey = picture().astype(float), to_grey(picture()).astype(float)
    assert scores["PSNR"] == pytest.approx(20 * np.log10(255 / np.sqrt(np.square(truth - grey).mean())), abs=0.1)
    sample.pred_ab = PixelData(data=torch.zeros(2, 3, 3))
    with pytest.raises(DataError, match=r"a\.png has gt_ab and pred_ab of shapes"):
        metric.measure(sample.to_dict())


def test_pictures_are_found_in_imagenets_folders_and_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no picture"):
        ColourPictures(tmp_path)
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "n01440764" / "a.JPEG").write_bytes(b"")
    found = ColourPictures(tmp_path).get_data_info(0)
    assert (found["video_id"], found["img_path"]) == ("n01440764", str(tmp_path / "n01440764" / "a.JPEG"))


def test_label_images_are_no_pictures_as_in_the_core(tmp_path):
    for place in ("JPEGImages/bear/1.jpg", "JPEGImages/bear/2.jpg", "JPEGImages/bear/2.png", "Annotations/bear/2.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    found = ColourPictures(tmp_path)
    bear = tmp_path / "JPEGImages" / "bear"
    files = [found.get_data_info(i)["img_path"] for i in range(len(found))]
    assert files == [str(bear / "1.jpg"), str(bear / "2.jpg")]
    assert files == [str(file) for _, pictures in unlabelled.walk(tmp_path) for file in pictures]
