"""Layouts of labelled clips: recognised, read pixel for pixel, and clear about what is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ttt_adapt.data import StreetClip, open_clips
from ttt_adapt.data.coco_masks import draw_mask
from ttt_adapt.data.layouts import CITYSCAPES, FORMATS
from ttt_adapt.data.street.scene import CLASSES as STREET_CLASSES
from ttt_adapt.data.street.scene import street_stream
from ttt_adapt.data.street.weather import drift
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.rows import clips_from

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / "shared" / "data"))
SIZE = (6, 8)


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ids(seed: int, values) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, dtype=np.uint8), SIZE)


# DAVIS -------------------------------------------------------------------------------------------------------------


def write_davis(root: Path, official: bool) -> Path:
    for clip in ("dog", "cows"):
        for i in range(2):
            mask = ids(i, [0, 255])
            if official:
                save(root / "JPEGImages" / "480p" / clip / f"{i:05d}.jpg", frame(i))
                save(root / "Annotations" / "480p" / clip / f"{i:05d}.png", mask)
                save(root / "JPEGImages" / "1080p" / clip / f"{i:05d}.jpg", frame(i))
            else:
                save(root / clip / "frames" / f"{i:05d}.jpg", frame(i))
                save(root / clip / "labels" / f"{i:05d}.png", mask)
    return root


@pytest.mark.parametrize("official", [True, False], ids=["as published", "folders"])
@pytest.mark.parametrize("format", ["auto", "davis"])
def test_davis_masks_are_two_classes_without_being_told(tmp_path, official, format):
    clips = open_clips(write_davis(tmp_path, official), format=format)
    assert [clip.name for clip in clips] == ["cows", "dog"]
    assert clips[0].classes == ("background", "foreground")
    assert [len(clip) for clip in clips] == [2, 2]
    np.testing.assert_array_equal(clips[1][1][1], ids(1, [0, 255]) // 255)


def test_the_object_ids_of_davis_2017_are_all_foreground(tmp_path):
    write_davis(tmp_path, official=True)
    objects = ids(1, [0, 1, 2, 3])
    save(tmp_path / "Annotations" / "480p" / "dog" / "00001.png", objects)
    np.testing.assert_array_equal(open_clips(tmp_path, ["dog"])[0][1][1], objects > 0)


@pytest.mark.skipif(not (DATA / "davis").is_dir(), reason=f"no DAVIS clips in {DATA}")
def test_the_davis_sequences_open_by_themselves():
    clips = open_clips(DATA / "davis", ["dog"], (48, 86))
    assert set(np.unique(clips[0][0][1])) == {0, 1}


# KITTI-STEP --------------------------------------------------------------------------------------------------------


def write_kitti(root: Path) -> Path:
    for split, clip in (("train", "0000"), ("val", "0002"), ("test", "0001")):
        for i in range(3):
            save(root / "images" / split / clip / f"{i:06d}.png", frame(i))
            codes = np.stack([ids(i, [0, 11, 18, 255]), ids(i + 1, [0, 1]), ids(i + 2, range(256))], axis=-1)
            if split != "test":
                save(root / "panoptic_maps" / split / clip / f"{i:06d}.png", codes)
    return root


def test_kitti_step_has_its_class_in_the_red_channel(tmp_path):
    clips = open_clips(write_kitti(tmp_path))
    assert sorted(clip.name for clip in clips) == ["0000", "0002"]  # the test sequences have no labels
    assert (clips[0].classes, clips[0].fps, clips[0].ignore) == (CITYSCAPES, 10.0, 255)
    image, labels = clips[0][2]
    np.testing.assert_array_equal(image, frame(2))
    np.testing.assert_array_equal(labels, ids(2, [0, 11, 18, 255]))


def test_a_clip_without_labels_is_refused_when_it_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"clip 0001 has no labels: .*panoptic_maps/test/0001 is missing.*--clips"):
        open_clips(write_kitti(tmp_path), ["0001"])


def test_labelled_sequences_keep_their_names_where_test_sequences_have_the_same(tmp_path):
    write_kitti(tmp_path)
    save(tmp_path / "images" / "test" / "0002" / "000000.png", frame(5))
    assert sorted(clip.name for clip in open_clips(tmp_path)) == ["0000", "0002"]
    np.testing.assert_array_equal(open_clips(tmp_path, ["0002"])[0][0][0], frame(0))
    with pytest.raises(DataError, match=r"clip test-0002 has no labels"):
        open_clips(tmp_path, ["test-0002"])


def test_no_clip_is_lost_to_another_of_its_name(tmp_path):
    write_coco_videos(tmp_path / "coco")
    train = tmp_path / "coco" / "annotations" / "train"
    train.mkdir()
    (train / "bar.json").write_text((tmp_path / "coco" / "annotations" / "val" / "bar.json").read_text())
    assert sorted(clip.name for clip in open_clips(tmp_path / "coco")) == ["bar", "havana", "val-bar"]
    for parent in ("a", "b"):
        save(tmp_path / parent / "clip" / "images" / "0.png", frame(0))
        save(tmp_path / parent / "clip" / "labels" / "0.png", ids(0, [0, 1]))
    with pytest.raises(DataError, match="several clips have the name clip"):
        open_clips([tmp_path / "a" / "clip", tmp_path / "b" / "clip"], classes=("x", "y"))


def test_a_frame_without_its_label_and_a_class_out_of_range_are_named(tmp_path):
    write_kitti(tmp_path)
    (tmp_path / "panoptic_maps" / "val" / "0002" / "000001.png").unlink()
    with pytest.raises(DataError, match=r"frame .*0002/000001\.png has no label; expected .*panoptic_maps/val/0002"):
        open_clips(tmp_path, ["0002"])
    save(tmp_path / "panoptic_maps" / "train" / "0000" / "000000.png", np.full((*SIZE, 3), 19, np.uint8))
    save(tmp_path / "panoptic_maps" / "train" / "0000" / "000001.png", np.zeros(SIZE, np.uint8))
    clip = open_clips(tmp_path, ["0000"])[0]
    with pytest.raises(DataError, match=r"000000\.png holds label id 19; expected 0\.\.18 or 255"):
        clip[0]
    with pytest.raises(DataError, match=r"000001\.png has mode L; expected an RGB image"):
        clip[1]


# Cityscapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes_has_one_clip_per_city_in_train_ids(tmp_path, kind):
    own = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 26, 31, 33, 34]
    for city in ("ulm", "bonn"):
        for i in (10, 2):
            stem = f"{city}_000000_{i}"
            save(tmp_path / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png", frame(i))
            save(
                tmp_path / "gtFine" / "val" / city / f"{stem}_gtFine_{kind}.png",
                ids(i, own if kind == "labelIds" else [0, 18, 255]),
            )
            save(tmp_path / "gtFine" / "val" / city / f"{stem}_gtFine_color.png", frame(i))
    clips = open_clips(tmp_path)
    assert [clip.name for clip in clips] == ["bonn", "ulm"]
    labels = clips[0][0][1]
    np.testing.assert_array_equal(clips[0][0][0], frame(2))
    if kind == "labelTrainIds":
        np.testing.assert_array_equal(labels, ids(2, [0, 18, 255]))
    else:
        train = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 26: 13, 31: 16, 33: 18}
        np.testing.assert_array_equal(labels, np.vectorize(lambda value: train.get(value, 255))(ids(2, own)))


# COCO --------------------------------------------------------------------------------------------------------------

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 44, "name": "bottle"}, {"id": 200, "name": "rug"}]

LONELY = json.dumps(
    {
        "images": [{"id": 1, "file_name": "bar_1.png"}],
        "annotations": [{"image_id": 2, "segments_info": []}],
        "categories": CATEGORIES,
    }
)


def write_coco_videos(root: Path) -> Path:
    """Two videos, N from 1; segment ids use all three channels."""
    for video in ("bar", "havana"):
        images, annotations = [], []
        for n in (1, 2, 10):
            name = f"{video}_{n}.png"
            save(root / "raw_images" / video / name, frame(n))
            codes = np.zeros((*SIZE, 3), np.uint8)
            codes[:2], codes[2:4], codes[4] = (1, 2, 3), (7, 0, 0), (9, 9, 9)
            save(root / "panoptic_images" / video / name, codes)
            segments = [
                {"id": 1 + 256 * 2 + 65536 * 3, "category_id": 200},
                {"id": 7, "category_id": 44},
                {"id": 9 + 256 * 9 + 65536 * 9, "category_id": 255},
            ]
            images.append({"id": n, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            annotations.append({"image_id": n, "file_name": name, "segments_info": segments})
        data = {"images": images[::-1], "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / "val").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / "val" / f"{video}.json").write_text(json.dumps(data))
    return root


def test_coco_videos_become_semantic_labels_in_frame_order(tmp_path):
    clips = open_clips(write_coco_videos(tmp_path))
    assert [clip.name for clip in clips] == ["bar", "havana"]
    assert clips[0].classes == ("person", "bottle", "rug")
    np.testing.assert_array_equal(clips[0][2][0], frame(10))
    # ignored category and pixels of no segment are void
    assert clips[0][0][1][:, 0].tolist() == [2, 2, 1, 1, 255, 255]


def test_category_255_is_void_even_where_the_file_lists_it(tmp_path):
    write_coco_videos(tmp_path)
    file = tmp_path / "annotations" / "val" / "bar.json"
    data = json.loads(file.read_text())
    data["categories"].insert(1, {"id": 255, "name": "void"})
    file.write_text(json.dumps(data))
    (clip,) = open_clips(tmp_path, ["bar"])
    assert clip.classes == ("person", "bottle", "rug")
    assert clip[0][1][:, 0].tolist() == [2, 2, 1, 1, 255, 255]


def test_the_record_of_a_coco_clip_depends_on_its_annotations(tmp_path):
    write_coco_videos(tmp_path)
    file = tmp_path / "annotations" / "val" / "bar.json"
    before = open_clips(tmp_path, ["bar"])[0].describe()
    text = file.read_text()
    file.write_text(text.replace('"category_id": 44', '"category_id": 10', 1))
    assert len(file.read_text()) == len(text)
    after = open_clips(tmp_path, ["bar"])[0].describe()
    assert after != before
    assert open_clips(tmp_path, ["havana"])[0].describe() not in (before, after)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda root: (root / "panoptic_images" / "bar" / "bar_2.png").unlink(), r"names the file bar_2\.png, and"),
        (lambda root: (root / "raw_images" / "bar" / "bar_1.png").unlink(), r"names the file bar_1\.png, and"),
        (lambda root: (root / "annotations" / "val" / "bar.json").write_text("{}"), r"bar\.json is no COCO annotation"),
        (lambda root: (root / "annotations" / "val" / "bar.json").write_text("{"), r"bar\.json is no COCO annotation"),
        (lambda root: (root / "annotations" / "val" / "bar.json").write_text(LONELY), r"bar_1\.png has no annotation"),
    ],
)  # fmt: skip
def test_a_broken_coco_video_is_named(tmp_path, damage, match):
    damage(write_coco_videos(tmp_path))
    assert open_clips(tmp_path, ["havana"])
    with pytest.raises(DataError, match=match):
        open_clips(tmp_path, ["bar"])


def test_instances_are_drawn_from_the_largest_to_the_smallest(tmp_path):
    save(tmp_path / "images" / "a.jpg", frame(0))
    square = {"size": [6, 8], "counts": [0, 12, 36]}  # the first two columns
    annotations = [
        {"image_id": 5, "category_id": 44, "area": 12, "segmentation": square},
        {"image_id": 5, "category_id": 1, "area": 40, "segmentation": [[0, 0, 4, 0, 4, 5, 0, 5]]},
        {"image_id": 5, "category_id": 3, "area": 1, "segmentation": {"size": [6, 8], "counts": [47, 1]}},
    ]
    image = {"id": 5, "file_name": "a.jpg", "height": 6, "width": 8}
    data = {"images": [image], "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (clip,) = open_clips(tmp_path)
    assert clip[0][1][0].tolist() == [1, 1, 0, 0, 255, 255, 255, 255]
    assert clip[0][1][5, 7] == 255  # a category that the file does not list


def test_a_polygon_covers_the_pixels_inside_it():
    square = draw_mask([[2, 1, 6, 1, 6, 5, 2, 5]], 8, 10)
    assert square.sum() == 16
    assert square[1:5, 2:6].all()
    two = draw_mask([[0, 0, 2, 0, 2, 2, 0, 2], [4, 4, 6, 4, 6, 6, 4, 6]], 8, 10)
    assert two.sum() == 8


def test_run_lengths_go_down_the_columns_in_both_codings():
    assert draw_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    # COCO's text coding: 48 + 5 bits each, bit 6 = more, differences to the run before the last from the fourth on
    mask = np.zeros((40, 3), bool)
    mask[3:40, 0] = mask[0:2, 1] = mask[10:14, 2] = True
    runs = [3, 39, 48, 4, 26]
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = not (value == 0 and not bits & 16) and not (value == -1 and bits & 16)
            text.append(chr(48 + bits + 32 * more))
            if not more:
                break
    for counts in (runs, "".join(text)):
        np.testing.assert_array_equal(draw_mask({"size": [40, 3], "counts": counts}, 40, 3), mask)
    with pytest.raises(DataError, match=r"covers 6 pixels; expected \[3, 3\]"):
        draw_mask({"size": [2, 3], "counts": [1, 2, 3]}, 3, 3)


def panoptic_file(root: Path, **changes) -> Path:
    """COCO's panoptic.json of one image, with other parts in the place of its own."""
    save(root / "images" / "a.png", frame(0))
    save(root / "panoptic" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}],
        "categories": CATEGORIES,
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 0, "category_id": 1}]}],
    }
    (root / "panoptic.json").write_text(json.dumps({**data, **changes}))
    return root


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": None}, "images is missing"),
        ({"images": {}}, "images is no list"),
        ({"images": [7]}, r"images\[0\] is no object"),
        ({"images": [{"id": 1}]}, r"images\[0\] has the file_name 'None'"),
        ({"images": [{"id": True, "file_name": "a.png"}]}, r"images\[0\] has the id 'True'"),
        ({"images": [{"id": 1, "file_name": "a.png"}] * 2}, "images has the id 1 2 times"),
        ({"images": [{"id": 1, "file_name": "a" * 3000}]}, "names the file aaa.*it is missing"),
        ({"images": []}, "lists no images"),
        ({"categories": [{"id": 1, "name": 5}]}, r"categories\[0\] has the name '5'"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "categories has the id 1 2 times"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "the class name 'a' comes twice"),
        ({"categories": [{"id": n, "name": f"c{n}"} for n in range(300)]}, "299 class names; labels hold"),
        ({"annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": {}}]}, "has the segments_info"),
        (
            {"annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": "x"}]}]},
            r"segments_info of image 1\[0\] has the id 'x'",
        ),
    ],
)
def test_a_wrong_part_of_a_coco_file_is_named_with_the_file(tmp_path, changes, match):
    with pytest.raises(DataError, match=rf"panoptic\.json.*{match}"):
        open_clips(panoptic_file(tmp_path, **changes))


def instances_file(root: Path, segmentation, **image) -> Path:
    save(root / "images" / "a.png", frame(0))
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8, **image}],
        "categories": CATEGORIES,
        "annotations": [{"id": 3, "image_id": 1, "category_id": 1, "segmentation": segmentation}],
    }
    (root / "instances.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize(
    ("segmentation", "match"),
    [
        ([[0, 0, 4, 4]], "a polygon is .*three corners"),
        ([[0, 0, 4, 4, 5]], "a polygon is"),
        ([[0, 0, 1e9, 4, 5, 5]], "a polygon is"),
        ([["a"] * 6], "a polygon is"),
        ([None], "a polygon is"),
        ({"size": [6, 8]}, "expected polygons, or size and counts"),
        ({"size": [6, 8], "counts": [-1, 49]}, "expected run lengths"),
        ({"size": [6, 8], "counts": [40]}, r"covers 40 pixels; expected \[6, 8\]"),
        ({"size": None, "counts": [48]}, r"a mask of None covers 48 pixels; expected \[6, 8\]"),
        ({"size": [6, 8], "counts": "\u007f"}, "expected COCO's text coding"),
        ({"size": [6, 8], "counts": "Z"}, "the counts of a mask break off"),
        ({"size": [6, 8], "counts": "o" * 99}, "expected COCO's text coding"),
    ],
)
def test_a_wrong_mask_is_named_with_its_file_its_number_and_its_frame(tmp_path, segmentation, match):
    (clip,) = open_clips(instances_file(tmp_path, segmentation))
    with pytest.raises(DataError, match=rf"instances\.json: annotation 3 of a\.png: .*{match}"):
        clip[0]


def test_an_instance_without_a_polygon_is_nothing(tmp_path):
    (clip,) = open_clips(instances_file(tmp_path, []))
    assert (clip[0][1] == 255).all()


def test_a_frame_of_another_size_than_its_masks_is_named_before_they_are_drawn(tmp_path):
    (clip,) = open_clips(instances_file(tmp_path, [], height=2**40))
    with pytest.raises(DataError, match=r"a\.png is 6 x 8 pixels high and wide, and .*instances\.json says 10995"):
        clip[0]


@pytest.mark.skipif(not (DATA / "coco100").is_dir(), reason=f"no COCO images in {DATA}")
def test_coco_images_give_the_same_people_from_segments_and_from_instances(tmp_path):
    for name in ("panoptic", "instances"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(DATA / "coco100" / "images")
        (tmp_path / name / "panoptic").symlink_to(DATA / "coco100" / "panoptic")
        (tmp_path / name / f"{name}.json").symlink_to(DATA / "coco100" / f"{name}.json")
    segments, instances = (open_clips(tmp_path / name)[0] for name in ("panoptic", "instances"))
    assert (len(segments), len(segments.classes), len(instances.classes)) == (100, 133, 80)
    same = union = 0
    for i in range(0, 20):
        a, b = segments[i][1] == 0, instances[i][1] == 0
        same, union = same + (a & b).sum(), union + (a | b).sum()
    assert same > 0.98 * union


# Street, names, formats --------------------------------------------------------------------------------------------


def test_the_street_is_the_stream_of_the_demo_drawn_once():
    clip = StreetClip(seed=3, frames=4, size=(48, 64))
    assert (clip.name, len(clip), clip.classes, clip.fps) == ("street-3", 4, STREET_CLASSES, 10.0)
    for (image, labels), (expected, truth) in zip(clip, street_stream(4, (48, 64), 1003), strict=True):
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(labels, truth)
    clip[0][0][:] = 0
    assert clip[0][0].any()
    np.testing.assert_array_equal(clip[-1][1], truth)
    assert [clip.weather(index) for index in (0, 1, -1)] == [drift(0.0), drift(1 / 3), drift(1.0)]
    for get in (clip.__getitem__, clip.weather):
        with pytest.raises(IndexError):
            get(4)


def test_the_street_is_chosen_by_its_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (clip,) = clips_from("street", [], (48, 64), seed=2, frames=3)
    assert (clip.name, len(clip), clip.size) == ("street-2", 3, (48, 64))
    with pytest.raises(ConfigError, match="choose a street by its seed"):
        clips_from("street", ["first"], None)
    with pytest.raises(ConfigError, match="seed is -1"):
        StreetClip(-1)


def test_class_names_may_be_given_where_the_data_bring_none(tmp_path):
    save(tmp_path / "one" / "images" / "0.png", frame(0))
    save(tmp_path / "one" / "labels" / "0.png", ids(0, [0, 1, 2]))
    with pytest.raises(DataError, match="classes .* are unknown"):
        clips_from(str(tmp_path), [], None)
    assert clips_from(str(tmp_path), [], None, classes=("a", "b", "c"))[0].classes == ("a", "b", "c")


def test_a_clip_folder_without_labels_is_said_to_have_none(tmp_path):
    save(tmp_path / "images" / "0.png", frame(0))
    with pytest.raises(DataError, match=r"images has no labels beside it; expected .*labels .*--task colorization"):
        open_clips(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_clips(tmp_path / "nowhere")


def test_an_unknown_format_and_a_format_that_does_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected auto or one of folder, davis, kitti-step, cityscapes, coco"):
        open_clips(tmp_path, format="voc")
    for format, missing in (("kitti-step", "images"), ("cityscapes", "leftImg8bit"), ("coco", "annotations")):
        with pytest.raises(DataError, match=missing):
            open_clips(tmp_path, format=format)
    assert list(FORMATS) == ["folder", "davis", "kitti-step", "cityscapes", "coco"]


@pytest.mark.parametrize("write", [write_kitti, write_coco_videos, lambda root: write_davis(root, True)])
def test_every_format_resizes_frames_and_labels_together(tmp_path, write):
    for clip in open_clips(write(tmp_path), size=(3, 4)):
        image, labels = clip[0]
        assert (image.shape, labels.shape, labels.dtype) == ((3, 4, 3), (3, 4), np.uint8)


def test_folders_that_hold_themselves_are_walked_once(tmp_path):
    save(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png", frame(0))
    save(tmp_path / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelTrainIds.png", ids(0, [0, 1]))
    (tmp_path / "leftImg8bit" / "val" / "again").symlink_to(tmp_path / "leftImg8bit", target_is_directory=True)
    assert [clip.name for clip in open_clips(tmp_path)] == ["ulm"]
