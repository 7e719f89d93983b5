"""The colours of a data set's classes: found in its index or its label images, and kept in the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_inputs import CLASSES, write_clip
from ttt_adapt.data import open_clips
from ttt_adapt.data.street.scene import PALETTE as STREET
from ttt_adapt.errors import DataError
from ttt_adapt.tasks.checkpoint import load_checkpoint
from ttt_adapt.tasks.segmentation.palette import find_palette
from ttt_adapt.tasks.segmentation.task import Segmentation
from ttt_adapt.training.joint import TrainConfig
from ttt_adapt.training.recipe import train

COLOURS = ((10, 20, 30), (200, 0, 0), (0, 0, 250))


def painted(root: Path, colours=COLOURS) -> Path:
    """A clip "a" whose label images have a palette."""
    write_clip(root / "a", 2)
    for file in (root / "a" / "labels").iterdir():
        image = Image.fromarray(np.asarray(Image.open(file)), mode="P")
        image.putpalette([level for colour in colours for level in colour] + [0] * 3 * (256 - len(colours)))
        image.save(file)
    return root


def index(root: Path, **fields) -> None:
    (root / "index.json").write_text(json.dumps({"classes": CLASSES, **fields}))


def found(root: Path, size=None) -> tuple:
    return Segmentation.stills(str(root), (), size, None).palette


@pytest.mark.parametrize("size", [None, (24, 32)])
@pytest.mark.parametrize("inside", [False, True])
def test_label_images_bring_their_palette(size, inside, tmp_path):
    painted(tmp_path)
    assert found(tmp_path / "a" if inside else tmp_path, size) == COLOURS


def test_the_index_comes_first_and_may_name_the_classes(tmp_path):
    painted(tmp_path)
    index(tmp_path, palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert found(tmp_path) == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    index(tmp_path, palette={"sky": [7, 8, 9], "road": [1, 2, 3], "car": [4, 5, 6]})
    assert found(tmp_path) == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


@pytest.mark.parametrize(
    "palette", [[], [[1, 2, 3]] * 2, [[1, 2]] * 3, [[1, 2, 300]] * 3, [[0.1, 0.2, 0.3]] * 3, "red", {"road": [1, 2, 3]}]
)
def test_a_palette_that_is_none_is_refused(palette, tmp_path):
    painted(tmp_path)
    index(tmp_path, palette=palette)
    with pytest.raises(DataError, match=r"index\.json .*expected one colour \[red, green, blue\] from 0 to 255"):
        found(tmp_path)


def test_an_index_is_read_as_that_of_the_classes_is_and_refused_in_words(tmp_path):
    painted(tmp_path)
    text = json.dumps({"classes": CLASSES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]})
    (tmp_path / "index.json").write_text(text, encoding="utf-8-sig")  # with a mark in front, as some editors write it
    assert found(tmp_path) == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    classes = {str(number): name for number, name in enumerate(CLASSES)}
    index(tmp_path, classes=classes, palette=dict(zip(CLASSES, COLOURS, strict=True)))
    assert found(tmp_path) == COLOURS
    (clip,) = open_clips(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is not JSON"):
        found(tmp_path)
    assert find_palette(tmp_path, [clip]) == COLOURS  # it was opened with what was there


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": ["a", "b", "c"], "palette": "red"}', "\x00"])
def test_an_index_that_the_clips_did_not_come_from_is_not_read(text, tmp_path):
    root = painted(tmp_path / "data")
    index(root)
    (tmp_path / "index.json").write_text(text)
    (root / "a" / "index.json").write_text(text)
    assert found(root) == found(root / "a") == COLOURS


@pytest.mark.parametrize(
    "colours",
    [((0, 0, 0), (1, 1, 1), (2, 2, 2)), ((10, 20, 30), (10, 20, 30), (5, 0, 0)), ((0, 0, 0), (200, 0, 0))],
    ids=["grey", "alike", "too few"],
)
def test_a_palette_that_does_not_tell_the_classes_apart_is_none(colours, tmp_path):
    assert found(painted(tmp_path, colours)) == ()


def coco(root: Path, *colours) -> Path:
    """One image of COCO's panoptic format with a category for each colour; None leaves the colour out."""
    for name in ("images", "panoptic"):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (1, 0, 0)).save(root / name / "0.png")
    categories = [
        {"id": 7 - number, "name": f"c{number}", **({} if colour is None else {"color": colour})}
        for number, colour in enumerate(colours)
    ]
    note = {"image_id": 1, "file_name": "0.png", "segments_info": [{"id": 1, "category_id": 7}]}
    images = [{"id": 1, "file_name": "0.png", "height": 8, "width": 8}]
    content = {"images": images, "categories": categories, "annotations": [note]}
    (root / "panoptic.json").write_text(json.dumps(content))
    return root


def test_categories_of_coco_bring_their_colours(tmp_path):
    assert found(coco(tmp_path, [10, 20, 30], [200, 0, 0], "#0000fA")) == COLOURS
    (tmp_path / "index.json").write_text(json.dumps({"classes": CLASSES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}))
    assert found(tmp_path) == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


@pytest.mark.parametrize("colours", [(None, None), ([10, 20, 30], None)])
def test_categories_without_a_colour_each_have_none(colours, tmp_path):
    assert found(coco(tmp_path, *colours)) == ()


@pytest.mark.parametrize("colour", ["red", [1, 2], [1, 2, 300], [0.1, 0.2, 0.3], "#12345", {"r": 1}, 5])
def test_a_category_with_a_colour_that_is_none_is_named(colour, tmp_path):
    with pytest.raises(
        DataError, match=r"panoptic\.json gives category 'c1' the color .*expected \[red, green, blue\]"
    ):
        found(coco(tmp_path, [1, 2, 3], colour))


def test_grey_label_images_have_none(tmp_path):
    write_clip(tmp_path / "a", 1)
    assert found(tmp_path) == ()


def test_a_palette_of_other_ids_than_the_classes_is_none(tmp_path):
    (tmp_path / "JPEGImages" / "a").mkdir(parents=True)
    (tmp_path / "Annotations" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / "a" / "0.jpg")
    objects = Image.fromarray(np.full((8, 8), 2, np.uint8), mode="P")  # object 2 is foreground, class 1
    objects.putpalette([level for colour in COLOURS for level in colour])
    objects.save(tmp_path / "Annotations" / "a" / "0.png")
    assert found(tmp_path) == ()


def test_training_keeps_the_palette_in_the_checkpoint(tmp_path):
    common = {
        "encoder": "resnet18",
        "encoder_options": {"channels": (8, 16, 24, 32)},
        "recipe": "main",
        "first_epochs": 0,
        "calibrate": False,
        "config": TrainConfig(epochs=1, batch_size=2),
    }
    train(str(painted(tmp_path / "data")), tmp_path / "m.safetensors", **common)
    made = load_checkpoint(tmp_path / "m.safetensors")
    assert made.spec.palette == COLOURS
    assert np.array_equal(made.task.palette, COLOURS)
    train("street", tmp_path / "s.safetensors", stills=2, size=(64, 96), **common)
    assert np.array_equal(load_checkpoint(tmp_path / "s.safetensors").task.palette, STREET)


def masks(root: Path, *levels: set) -> Path:
    """A clip without class names, whose labels hold these levels."""
    for kind in ("images", "labels"):
        (root / "a" / kind).mkdir(parents=True)
    for number, held in enumerate(levels):
        Image.new("RGB", (8, 8)).save(root / "a" / "images" / f"{number}.png")
        ids = np.resize(sorted(held), (8, 8)).astype(np.uint8)
        Image.fromarray(ids).save(root / "a" / "labels" / f"{number}.png")
    return root


@pytest.mark.parametrize("levels", [({0, 255},), ({0}, {0, 255}), ({0}, {0}, {0, 255}, {0})], ids=str)
@pytest.mark.parametrize("classes", [None, ["background", "foreground"]])
def test_masks_of_0_and_255_are_recognised_though_the_first_ones_are_empty(levels, classes, tmp_path):
    (clip,) = open_clips(masks(tmp_path, *levels), classes=classes)
    assert clip.classes == ("background", "foreground")
    for (_, ids), held in zip(clip, levels, strict=True):
        assert set(np.unique(ids).tolist()) == {int(level == 255) for level in held}


def test_two_other_classes_and_void_are_no_masks(tmp_path):
    (clip,) = open_clips(masks(tmp_path, {0, 255}), classes=["road", "car"])
    assert set(np.unique(clip[0][1]).tolist()) == {0, 255}
