"""Labelled clips and training stills."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ttt_adapt.data import Augment, LabelledClip, StillsDataset, open_clips
from ttt_adapt.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / "shared" / "data"))
CLASSES = ("sky", "road", "car")
NEUTRAL = Augment(scale=(1, 1), flip=0, brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), gamma=(1, 1), hue=(0, 0))
needs_camvid = pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason=f"no CamVid clips in {DATA}")
needs_davis = pytest.mark.skipif(not (DATA / "davis").is_dir(), reason=f"no DAVIS clips in {DATA}")


def make_frame(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_labels(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    ids = np.array([0, 1, 2, 255], dtype=np.uint8)
    return ids[np.random.default_rng(seed).integers(0, 4, (height, width))]


def write_clip(folder: Path, stems=("0", "1", "2"), frames="images", labels="labels", suffix=".png") -> Path:
    """A clip whose i-th stem has the frame and labels of seed i."""
    for seed, stem in enumerate(stems):
        for sub, array, ending in ((frames, make_frame(seed), suffix), (labels, make_labels(seed), ".png")):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / sub / f"{stem}{ending}")
    return folder


def make_pairs(count: int = 4, height: int = 24, width: int = 32) -> list:
    return [(make_frame(seed, height, width), make_labels(seed, height, width)) for seed in range(count)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Clips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["images", "frames"])
def test_two_folders_are_a_clip_and_come_back_pixel_for_pixel(tmp_path, frames):
    clip = LabelledClip(write_clip(tmp_path / "street", frames=frames), classes=CLASSES)
    assert (clip.name, clip.classes, clip.ignore, len(clip)) == ("street", CLASSES, 255, 3)
    assert clip.fps is None
    assert clip.times is None
    for seed, (frame, labels) in enumerate(clip):
        assert frame.dtype == labels.dtype == np.uint8
        np.testing.assert_array_equal(frame, make_frame(seed))
        np.testing.assert_array_equal(labels, make_labels(seed))


def test_one_folder_of_jpg_and_png_is_a_clip(tmp_path):
    clip = LabelledClip(write_clip(tmp_path / "street", frames="", labels="", suffix=".jpg"), classes=CLASSES)
    assert len(clip) == 3
    np.testing.assert_array_equal(clip[1][1], make_labels(1))


def test_frames_come_in_natural_order(tmp_path):
    clip = LabelledClip(write_clip(tmp_path / "street", stems=("f2", "f10", "f1")), classes=CLASSES)
    for place, seed in enumerate([2, 0, 1]):
        np.testing.assert_array_equal(clip[place][1], make_labels(seed))
    np.testing.assert_array_equal(clip[-1][1], make_labels(1))
    with pytest.raises(IndexError):
        clip[3]


def test_palette_labels_give_ids_not_colours(tmp_path):
    folder = write_clip(tmp_path / "street")
    image = Image.fromarray(make_labels(0))
    image.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
    image.save(folder / "labels" / "0.png")
    np.testing.assert_array_equal(LabelledClip(folder, classes=CLASSES)[0][1], make_labels(0))


def test_frames_and_labels_may_be_changed_in_place(tmp_path):
    clip = LabelledClip(write_clip(tmp_path / "street"), classes=CLASSES)
    frame, labels = clip[0]
    before = frame.copy(), labels.copy()
    frame[:], labels[:] = frame + 1, labels + 1
    for again, first in zip(clip[0], before, strict=True):
        np.testing.assert_array_equal(again, first)


def test_an_index_beside_the_clip_gives_classes_ignore_id_and_times(tmp_path):
    folder = write_clip(tmp_path / "street")
    frames = [{"frame": f"{i}.png", "t": 0.5 * i} for i in range(3)]
    index = {"classes": CLASSES, "ignore": 255, "clips": [{"clip": "street", "label_gap_s": 0.5, "frames": frames}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    clip = LabelledClip(folder)
    assert (clip.classes, clip.ignore, clip.fps, clip.times) == (CLASSES, 255, 2.0, (0.0, 0.5, 1.0))
    assert LabelledClip(folder, classes=("a", "b", "c")).classes == ("a", "b", "c")


def test_binary_masks_become_classes_0_and_1(tmp_path):
    folder = write_clip(tmp_path / "dog", stems=("0",))
    mask = np.where(make_labels(0) > 1, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(folder / "labels" / "0.png")
    clip = LabelledClip(folder, binary=True)
    assert clip.classes == ("background", "foreground")
    np.testing.assert_array_equal(clip[0][1], mask // 255)


def test_resized_labels_keep_their_ids_and_resized_frames_their_mean(tmp_path):
    folder = write_clip(tmp_path / "street")
    frame, labels = LabelledClip(folder, classes=CLASSES, size=(6, 8))[0]
    assert frame.shape == (6, 8, 3)
    assert labels.shape == (6, 8)
    assert set(np.unique(labels)) <= {0, 1, 2, 255}
    # Antialiasing averages all pixels; plain bilinear sampling at half size would miss no pixel, at a third it would.
    coarse, _ = LabelledClip(folder, classes=CLASSES, size=(2, 2))[0]
    assert abs(coarse.mean() - make_frame(0).mean()) < 12
    assert coarse.std() < make_frame(0).std() / 3


def test_open_clips_opens_a_tree_in_natural_order_or_by_name(tmp_path):
    for name in ("c10", "c2", "c1"):
        write_clip(tmp_path / name)
    assert [clip.name for clip in open_clips(tmp_path, classes=CLASSES)] == ["c1", "c2", "c10"]
    assert [clip.name for clip in open_clips(tmp_path, ["c10", "c1"], classes=CLASSES)] == ["c10", "c1"]
    assert [clip.name for clip in open_clips(tmp_path / "c2", classes=CLASSES)] == ["c2"]
    clips = open_clips([tmp_path / "c2", tmp_path / "c1"], size=(4, 4), classes=CLASSES)
    assert [(clip.name, clip[0][1].shape) for clip in clips] == [("c2", (4, 4)), ("c1", (4, 4))]
    with pytest.raises(DataError, match=r"'c3'.*'c1'"):
        open_clips(tmp_path, ["c3"], classes=CLASSES)
    with pytest.raises(DataError, match="does not exist"):
        open_clips(tmp_path / "nowhere")


def break_label(folder: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(folder / "labels" / "1.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "labels" / "1.png").unlink(), r"frame .*1\.png has no label"),
        (lambda folder: (folder / "images" / "1.png").unlink(), r"label .*1\.png has no frame"),
        (lambda folder: [file.unlink() for file in (folder / "images").iterdir()], "no frames"),
        (lambda folder: (folder / "labels").rename(folder / "masks"), "no labels beside it"),
        (lambda folder: folder.rename(folder.parent / "moved"), "does not exist"),
        (lambda folder: (folder.parent / "index.json").write_text("{"), "not JSON"),
    ],
)
def test_a_broken_clip_is_refused_when_opened(tmp_path, damage, message):
    folder = write_clip(tmp_path / "street")
    damage(folder)
    with pytest.raises(DataError, match=message):
        LabelledClip(folder, classes=CLASSES)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: break_label(folder, make_labels(1, 6, 8)), r"1\.png is 6 x 8, its frame .* 12 x 16"),
        (lambda folder: break_label(folder, make_labels(1) // 255 * 7), r"1\.png holds label id 7; expected 0\.\.2"),
        (lambda folder: break_label(folder, make_frame(1)), r"1\.png has mode RGB"),
        (lambda folder: (folder / "images" / "1.png").write_bytes(b"no image"), r"1\.png cannot be read"),
    ],
)
def test_a_broken_file_is_named_when_read(tmp_path, damage, message):
    folder = write_clip(tmp_path / "street")
    damage(folder)
    clip = LabelledClip(folder, classes=CLASSES, size=(4, 4))
    clip[0]
    with pytest.raises(DataError, match=message):
        clip[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: break_label(folder, make_labels(1, 6, 8)), r"1\.png is 6 x 8, its frame .* 12 x 16"),
        (lambda folder: break_label(folder, make_labels(1) // 255 * 7), r"1\.png holds label id 7; expected 0\.\.2"),
        (lambda folder: (folder / "labels" / "1.png").write_bytes(b"no image"), r"labels.1\.png cannot be read"),
        (lambda folder: (folder / "images" / "1.png").write_bytes(b"no image"), r"images.1\.png cannot be read"),
    ],
)
def test_all_labels_can_be_checked_without_decoding_a_frame(tmp_path, damage, message, monkeypatch):
    folder = write_clip(tmp_path / "street")
    clip = LabelledClip(folder, classes=CLASSES)
    damage(folder)
    monkeypatch.setattr("ttt_adapt.data.labelled.read_picture", lambda file: pytest.fail(f"decoded {file}"))
    with pytest.raises(DataError, match=message):
        clip.check_labels()
    assert LabelledClip(write_clip(tmp_path / "whole"), classes=CLASSES).check_labels() is None


def test_the_record_of_a_clip_depends_on_the_contents_of_every_file_and_on_what_ids_mean(tmp_path):
    folder = write_clip(tmp_path / "street")
    clip = LabelledClip(folder, classes=CLASSES)
    known = {clip.describe()["content"]}
    assert LabelledClip(folder, classes=CLASSES).describe() == clip.describe()
    for file in (folder / "labels" / "2.png", folder / "images" / "0.png"):
        written = file.read_bytes()
        file.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))  # the same name and length
        known.add(clip.describe()["content"])
    known |= {LabelledClip(folder, **made).describe()["content"] for made in (
        {"classes": CLASSES[::-1]}, {"classes": CLASSES, "ignore": 254}
    )}  # fmt: skip
    assert len(known) == 5


def test_unknown_classes_are_refused_rather_than_guessed(tmp_path):
    with pytest.raises(DataError, match=r"classes .* unknown.*binary=True"):
        LabelledClip(write_clip(tmp_path / "street"))
    with pytest.raises(DataError, match="0 and 255"):
        LabelledClip(tmp_path / "street", binary=True)[0]


@needs_camvid
def test_camvid_clips_open_with_classes_and_times():
    clips = {clip.name: clip for clip in open_clips(DATA / "camvid", size=(90, 120))}
    dense = clips["0016E5_val_c"]
    assert len(dense) == 101
    assert dense.fps == pytest.approx(15.0)
    assert dense.times is not None
    assert dense.times[-1] == pytest.approx(200 / 30, abs=1e-3)
    assert dense.classes[0] == "Sky"
    assert len(dense.classes) == 11
    frame, labels = dense[-1]
    assert frame.shape == (90, 120, 3)
    assert set(np.unique(labels)) <= {*range(11), 255}
    # Sky is above road.
    assert np.argwhere(labels == 0)[:, 0].mean() < np.argwhere(labels == 3)[:, 0].mean()


@needs_davis
def test_davis_masks_open_as_two_classes():
    clips = open_clips(DATA / "davis", binary=True)
    assert len(clips) == 10
    frame, labels = clips[0][0]
    assert frame.shape == (480, 854, 3)
    assert set(np.unique(labels)) == {0, 1}


# Stills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_without_augmentation_samples_are_the_files_in_0_to_1(tmp_path, cache):
    clips = [LabelledClip(write_clip(tmp_path / name), classes=CLASSES) for name in ("a", "b")]
    stills = StillsDataset(clips, cache=cache)
    assert len(stills) == 6
    image, labels = stills[4]
    assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(image.numpy(), make_frame(1).transpose(2, 0, 1) / np.float32(255), atol=1e-7)
    np.testing.assert_array_equal(labels.numpy(), make_labels(1))
    assert len(StillsDataset(clips[0])) == 3
    with pytest.raises(IndexError):
        stills[6]


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    stills, other = (StillsDataset(make_pairs(), Augment(noise=(0.01, 0.1)), seed=3) for _ in range(2))
    stills.set_epoch(2)
    expected = [stills[index] for index in range(4)]
    torch.rand(7)
    other[1]
    other.set_epoch(2)
    for index in (3, 0, 2, 1):
        for ours, theirs in zip(expected[index], other[index], strict=True):
            assert torch.equal(ours, theirs)
    loader = torch.utils.data.DataLoader(other, batch_size=4, num_workers=2)
    images, _ = next(iter(loader))
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    other.set_epoch(3)
    assert not torch.equal(expected[0][0], other[0][0])
    reseeded = StillsDataset(make_pairs(), Augment(), seed=4)
    reseeded.set_epoch(2)
    assert not torch.equal(expected[0][0], reseeded[0][0])


def test_augmentation_leaves_the_cached_frames_alone():
    pairs = make_pairs(1)
    stills = StillsDataset(pairs, Augment(blur=(1, 1), noise=(0.1, 0.1)))
    for epoch in range(5):
        stills.set_epoch(epoch)
        stills[0]
    np.testing.assert_array_equal(pairs[0][0], make_frame(0, 24, 32))
    np.testing.assert_array_equal(pairs[0][1], make_labels(0, 24, 32))


def test_mixed_sizes_classes_and_broken_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        StillsDataset([])
    with pytest.raises(DataError, match=r"\(12, 16, 3\), others \(24, 32, 3\).*size="):
        StillsDataset([*make_pairs(1), *make_pairs(1, 12, 16)])
    with pytest.raises(DataError, match="uint8 frame"):
        StillsDataset([(make_frame(0), make_labels(0)[:4])])
    first = LabelledClip(write_clip(tmp_path / "a"), classes=CLASSES)
    second = LabelledClip(write_clip(tmp_path / "b"), classes=("x", "y", "z"))
    with pytest.raises(DataError, match="different classes"):
        StillsDataset([first, second])


# Augmentation ------------------------------------------------------------------------------------------------------


def sample(height: int = 24, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    frame, labels = make_pairs(1, height, width)[0]
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255, torch.from_numpy(labels).long()


def test_neutral_ranges_change_nothing():
    image, labels = sample()
    new_image, new_labels = NEUTRAL(image, labels, generator())
    torch.testing.assert_close(new_image, image, atol=2e-6, rtol=0)
    assert torch.equal(new_labels, labels)


@pytest.mark.parametrize("size", [(24, 32), (7, 5), (1, 3)])
def test_shapes_ranges_and_ids_survive_every_draw(size):
    image, labels = sample(*size)
    augment = Augment(scale=(0.3, 3.0), blur=(0, 2), noise=(0, 0.2))
    for seed in range(40):
        new_image, new_labels = augment(image, labels, generator(seed))
        assert new_image.shape == image.shape
        assert new_labels.shape == labels.shape
        assert new_image.dtype == torch.float32
        assert new_image.isfinite().all()
        assert new_image.min() >= 0
        assert new_image.max() <= 1
        assert set(new_labels.unique().tolist()) <= {0, 1, 2, 255}


def test_a_flip_mirrors_image_and_labels_together():
    image, labels = sample()
    new_image, new_labels = replace(NEUTRAL, flip=1.0)(image, labels, generator())
    torch.testing.assert_close(new_image, image.flip(-1), atol=2e-6, rtol=0)
    assert torch.equal(new_labels, labels.flip(-1))


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
def test_image_and_labels_stay_aligned_under_zoom(scale):
    # The image is a ramp of the pixel's position and the labels are that position in blocks of 4 pixels.
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    for position, length in ((rows, 48), (columns, 64)):
        image = ((position + 0.5) / length).expand(3, -1, -1).contiguous()
        for seed in range(8):
            new_image, new_labels = replace(NEUTRAL, scale=(scale, scale))(image, position // 4, generator(seed))
            inside = new_labels != 255
            off = (new_image[0] * length - (4 * new_labels + 2)).abs()[inside]
            assert off.max() < 2 + 1 / scale
            assert inside.float().mean() == pytest.approx(min(1.0, scale**2), abs=0.05)


def test_zooming_in_equals_resizing_a_crop():
    image, labels = sample(24, 32)
    new_image, new_labels = replace(NEUTRAL, scale=(2, 2))(image, labels, generator(5))
    crops = [(top, left) for top in range(13) for left in range(17)]
    resized = torch.stack([image[:, top : top + 12, left : left + 16] for top, left in crops])
    errors = (F.interpolate(resized, (24, 32), mode="bilinear", antialias=True) - new_image).abs().amax((1, 2, 3))
    assert errors.min() < 1e-5
    top, left = crops[int(errors.argmin())]
    expected = labels[top : top + 12, left : left + 16].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(new_labels, expected)


def test_brightness_contrast_saturation_and_gamma_follow_their_formulas():
    image, labels = sample()
    image = 0.3 + 0.3 * image  # far from the limits, so nothing is clamped
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (luma * image).sum(0, keepdim=True)
    expected = {
        "brightness": 1.2 * image,
        "contrast": grey.mean() + 1.2 * (image - grey.mean()),
        "saturation": grey + 1.2 * (image - grey),
        "gamma": image**1.2,
    }
    for name, wanted in expected.items():
        new_image, _ = replace(NEUTRAL, **{name: (1.2, 1.2)})(image, labels, generator())
        torch.testing.assert_close(new_image, wanted, atol=2e-3, rtol=0)


def test_hue_keeps_grey_grey_and_the_luma_of_colours():
    image, labels = sample()
    image = 0.4 + 0.2 * image
    luma = torch.tensor([0.299, 0.587, 0.114])
    turned, _ = replace(NEUTRAL, hue=(0.2, 0.2))(image, labels, generator())
    assert (turned - image).abs().max() > 0.02
    torch.testing.assert_close(torch.tensordot(luma, turned, 1), torch.tensordot(luma, image, 1), atol=1e-4, rtol=0)
    grey = image[:1].expand(3, -1, -1).contiguous()
    torch.testing.assert_close(replace(NEUTRAL, hue=(0.2, 0.2))(grey, labels, generator())[0], grey, atol=1e-3, rtol=0)


def test_blur_keeps_the_mean_and_noise_has_the_asked_deviation():
    image, labels = sample(48, 64)
    blurred, _ = replace(NEUTRAL, blur=(1.5, 1.5))(image, labels, generator())
    assert blurred.mean() == pytest.approx(image.mean().item(), abs=0.01)
    assert blurred.std() < image.std() / 3
    flat = torch.full_like(image, 0.5)
    noisy, _ = replace(NEUTRAL, noise=(0.05, 0.05))(flat, labels, generator())
    assert (noisy - 0.5).std() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    "wrong", [{"scale": (0.0, 1.0)}, {"gamma": (2.0, 1.0)}, {"flip": 1.5}, {"noise": (-0.1, 0.1)}, {"hue": (-2, 0)}]
)
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Augment(**wrong)


@needs_camvid
def test_training_stills_from_camvid_batch_and_hold_many_classes():
    stills = StillsDataset(open_clips(DATA / "camvid", ["0016E5_train_d"], size=(144, 192)), Augment())
    images, labels = next(iter(torch.utils.data.DataLoader(stills, batch_size=16)))
    assert images.shape == (16, 3, 144, 192)
    assert labels.shape == (16, 144, 192)
    assert len(labels.unique()) == 12
    assert 0.2 < images.mean() < 0.7
