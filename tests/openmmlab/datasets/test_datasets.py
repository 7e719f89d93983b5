"""Data sets that are videos: order, labels, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, DefaultScope, init_default_scope
from PIL import Image

import miniatures
import ttt_adapt_openmmlab  # noqa: F401
from miniatures import CAR, HEIGHT, PERSON, ROAD, SKY, WIDTH
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets import kitti_step as kitti

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
real_camvid = pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason=f"no real video in {DATA / 'camvid'}")
real_coco = pytest.mark.skipif(not (DATA / "coco100").is_dir(), reason=f"no real images in {DATA / 'coco100'}")

SEG = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations"},
    {"type": "PackSegInputs", "meta_keys": ("img_path", "ori_shape", "img_shape", "video_id", "frame_id")},
]
DET_KEYS = (
    "img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "video_id", "frame_id", "instances",
    "segments_info", "seg_map_path",
)  # fmt: skip


def det(*loading: dict) -> list[dict]:
    return [{"type": "LoadImageFromFile"}, *loading, {"type": "PackDetInputs", "meta_keys": DET_KEYS}]


PANOPTIC = det({"type": "LoadPanopticSegments"})
INSTANCE = det({"type": "LoadAnnotations", "with_bbox": True, "with_mask": True})


@pytest.fixture
def scope(request):
    """The scope in which configs of a library are built."""
    before = DefaultScope.get_current_instance()
    if request.param == "mmdet":
        import mmdet.datasets  # noqa: F401
    else:
        import mmseg.datasets  # noqa: F401
    init_default_scope(request.param)
    yield request.param
    if before is not None:
        init_default_scope(before.scope_name)


mmseg = pytest.mark.parametrize("scope", ["mmseg"], indirect=True)
mmdet = pytest.mark.parametrize("scope", ["mmdet"], indirect=True)
both = pytest.mark.parametrize("scope", ["mmseg", "mmdet"], indirect=True)


def build(kind: str, root: Path, **options):
    return DATASETS.build(dict(type=kind, data_root=str(root), **options))


def order(dataset) -> list[tuple[str, int, str]]:
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [(info["video_id"], info["frame_id"], Path(info["img_path"]).name) for info in infos]


@both
def test_every_data_set_builds_by_its_name_from_either_library(scope, tmp_path):
    trees = {
        "CamVidStream": miniatures.camvid(tmp_path / "a"),
        "KittiStep": miniatures.kitti_step(tmp_path / "b"),
        "CocoVideos": miniatures.coco_videos(tmp_path / "c"),
    }
    for kind, root in trees.items():
        assert len(build(kind, root)) > 0


@mmseg
def test_camvid_frames_come_in_the_order_of_the_index_and_clips_in_the_order_asked(scope, tmp_path):
    dataset = build("CamVidStream", miniatures.camvid(tmp_path), clips=["two_b", "one_a"])
    assert order(dataset) == [
        ("two_b", 0, "2_two_b.jpg"), ("two_b", 1, "1_two_b.jpg"),
        ("one_a", 0, "3_one_a.jpg"), ("one_a", 1, "2_one_a.jpg"), ("one_a", 2, "1_one_a.jpg"),
    ]  # fmt: skip
    assert len(dataset.metainfo["classes"]) == len(dataset.metainfo["palette"]) == 11


@mmseg
def test_camvid_samples_carry_the_ids_of_the_palette_image_and_the_video(scope, tmp_path):
    dataset = build("CamVidStream", miniatures.camvid(tmp_path), pipeline=SEG)
    item = dataset[1]
    sample = item["data_samples"]
    expected = miniatures.boxed((0, 0, 8, 8, 8), (8, 0, 16, 4, 255), fill=1)
    assert torch.equal(sample.gt_sem_seg.data[0], torch.from_numpy(expected))
    assert (sample.metainfo["video_id"], sample.metainfo["frame_id"]) == ("one_a", 1)
    assert item["inputs"].shape == (3, HEIGHT, WIDTH)


@real_camvid
@mmseg
def test_the_real_camvid_has_the_frames_and_class_pixels_that_its_index_counts(scope):
    dataset = build("CamVidStream", DATA / "camvid", clips=["0016E5_val_c", "0016E5_train_d"], pipeline=SEG)
    index = json.loads((DATA / "camvid" / "index.json").read_text())
    counts = {clip["clip"]: clip["class_pixels"] for clip in index["clips"]}
    assert len(dataset) == 101 + 16
    samples = [dataset[i]["data_samples"] for i in range(101, 117)]
    total = sum(torch.bincount(sample.gt_sem_seg.data.flatten(), minlength=256) for sample in samples)
    expected = counts["0016E5_train_d"]
    assert {name: int(total[i]) for i, name in enumerate(dataset.metainfo["classes"])} == {
        name: expected[name] for name in dataset.metainfo["classes"]
    }
    assert int(total[255]) == expected["void"]


@mmseg
def test_kitti_semantic_labels_are_the_red_channel(scope, tmp_path):
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadKittiStepAnnotations"}, {"type": "PackSegInputs"}]
    dataset = build("KittiStep", miniatures.kitti_step(tmp_path), pipeline=pipeline)
    assert order(dataset) == [
        *(("0002", i, f"{i:06d}.png") for i in range(3)), *(("0006", i, f"{i:06d}.png") for i in range(2)),
    ]  # fmt: skip
    labels = dataset[0]["data_samples"].gt_sem_seg.data[0]
    red = np.asarray(Image.open(dataset.get_data_info(0)["seg_map_path"]))[..., 0]
    assert np.array_equal(labels.numpy(), red)
    assert set(labels.unique().tolist()) == {ROAD, SKY, PERSON, CAR, 255}
    from mmseg.datasets import CityscapesDataset

    assert dataset.metainfo["classes"] == CityscapesDataset.METAINFO["classes"]
    assert dataset.metainfo["palette"] == CityscapesDataset.METAINFO["palette"]


@mmdet
def test_kitti_panoptic_labels_put_things_first_and_take_persons_without_a_number_for_a_crowd(scope, tmp_path):
    root = miniatures.kitti_step(tmp_path)
    dataset = build("KittiStep", root, task="panoptic", pipeline=det({"type": "LoadKittiStepAnnotations"}))
    meta = dataset.metainfo
    assert meta["classes"][:3] == ("person", "car", "road")
    assert meta["classes"] == (*meta["thing_classes"], *meta["stuff_classes"])
    assert len(meta["classes"]) == len(meta["palette"]) == 19
    sample = dataset[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0, 1, 1]
    boxes = sorted(map(tuple, sample.gt_instances.bboxes.tensor.int().tolist()))
    assert boxes == [(2, 10, 10, 16), (12, 10, 20, 18), (22, 9, 25, 17)]
    assert sorted(sample.gt_instances.masks.masks.sum((1, 2)).tolist()) == [24, 48, 64]
    names = {(meta["classes"][item["category"]], item["is_thing"]) for item in sample.metainfo["segments_info"]}
    assert names == {("road", False), ("sky", False), ("person", False), ("person", True), ("car", True)}
    classes = sample.gt_sem_seg.sem_seg[0]
    assert classes[0, 0] == meta["classes"].index("sky")
    assert classes[23, 0] == 255


@mmseg
def test_the_papers_sets_are_nine_and_twelve_sequences_and_insist_on_all(scope, tmp_path):
    assert not set(kitti.PAPER_VAL) & set(kitti.PAPER_TEST)
    assert sorted(kitti.PAPER_VAL + kitti.PAPER_TEST) == [f"{i:04d}" for i in range(21)]
    root = miniatures.kitti_step(tmp_path, "train", dict.fromkeys(kitti.PAPER_TEST, 1))
    assert [video for video, _, _ in order(build("KittiStep", root, split="paper_test"))] == list(kitti.PAPER_TEST)
    with pytest.raises(DataError, match="0007.*it holds 0002, 0006"):
        build("KittiStep", miniatures.kitti_step(tmp_path / "part"), split="paper_val")


@mmdet
def test_coco_videos_come_by_number_not_by_text(scope, tmp_path):
    dataset = build("CocoVideos", miniatures.coco_videos(tmp_path), videos=["bar"])
    assert order(dataset) == [("bar", i, f"bar_{i + 1}.png") for i in range(11)]


@mmdet
def test_coco_videos_instances_are_the_things_and_ignored_regions_are_flagged(scope, tmp_path):
    dataset = build("CocoVideos", miniatures.coco_videos(tmp_path), pipeline=INSTANCE)
    assert len(dataset.metainfo["classes"]) == 80
    sample = dataset[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0, 0]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[2, 2, 10, 14], [12, 2, 18, 10]]
    assert sample.gt_instances.masks.masks.sum((1, 2)).tolist() == [96, 48]
    ignored = [(item["bbox_label"], item["ignore_flag"]) for item in sample.metainfo["instances"]]
    assert ignored == [(0, 0), (0, 0), (16, 1), (-1, 1)]  # the crowd of dogs, and category 255


@mmdet
def test_coco_videos_panoptic_segments_leave_out_category_255(scope, tmp_path):
    dataset = build("CocoVideos", miniatures.coco_videos(tmp_path), task="panoptic", pipeline=PANOPTIC)
    assert len(dataset.metainfo["classes"]) == 133
    sample = dataset[0]["data_samples"]
    wall = dataset.metainfo["classes"].index("wall-other-merged")
    segments = [(item["id"], item["category"], item["is_thing"]) for item in sample.metainfo["segments_info"]]
    assert segments == [(70000, 0, True), (301, 0, True), (9, 16, False), (500, wall, False)]
    classes, (ids, _) = sample.gt_sem_seg.sem_seg[0], miniatures.video_frame()
    assert (classes == 255).numpy().tolist() == np.isin(ids, [0, 7]).tolist()
    assert (classes == 16).numpy().tolist() == (ids == 9).tolist()
    assert sample.gt_instances.labels.tolist() == [0, 0]


@mmdet
def test_coco_labels_are_those_of_mmdetection(scope):
    from ttt_adapt_openmmlab.datasets.coco_videos import LABELS, STUFF_IDS, THING_IDS

    assert (len(THING_IDS), len(STUFF_IDS), len(LABELS)) == (80, 53, 133)
    if (DATA / "coco100").is_dir():
        data = json.loads((DATA / "coco100" / "panoptic.json").read_text())
        assert [item["id"] for item in data["categories"]] == list(LABELS)
        from mmdet.datasets import CocoPanopticDataset

        names = [item["name"] for item in data["categories"]]
        assert tuple(names) == CocoPanopticDataset.METAINFO["classes"]


@real_coco
@mmdet
def test_coco100_streams_as_one_video_through_mmdetections_own_data_sets(scope):
    common = {"data_root": str(DATA / "coco100"), "test_mode": True, "indices": 4}
    panoptic = DATASETS.build(
        dict(
            type="CocoPanopticDataset",
            ann_file="panoptic.json",
            data_prefix={"img": "images/", "seg": "panoptic/"},
            pipeline=PANOPTIC,
            **common,
        )
    )
    instance = DATASETS.build(
        dict(
            type="CocoDataset",
            ann_file="instances.json",
            data_prefix={"img": "images/"},
            pipeline=INSTANCE,
            **common,
        )
    )
    from ttt_adapt_openmmlab.datasets.frame_order import video_of

    samples = [dataset[i]["data_samples"] for dataset in (panoptic, instance) for i in range(4)]
    assert len({video_of(sample.metainfo) for sample in samples}) == 1
    for a, b in zip(samples[:4], samples[4:], strict=True):
        assert a.metainfo["img_path"] == b.metainfo["img_path"]
        assert sorted(a.gt_instances.labels.tolist()) == sorted(b.gt_instances.labels.tolist())
        areas = [sorted(s.gt_instances.masks.masks.sum((1, 2)).tolist()) for s in (a, b)]
        assert areas[0] == areas[1]


@mmdet
def test_a_panoptic_image_gives_the_segments_areas_that_coco_lists(scope):
    if not (DATA / "coco100").is_dir():
        pytest.skip(f"no real images in {DATA / 'coco100'}")
    from ttt_adapt_openmmlab.datasets.label_images import read_segment_ids

    data = json.loads((DATA / "coco100" / "panoptic.json").read_text())
    for item in data["annotations"][:5]:
        ids, areas = np.unique(read_segment_ids(DATA / "coco100" / "panoptic" / item["file_name"]), return_counts=True)
        painted = dict(zip(ids.tolist(), areas.tolist(), strict=True))
        painted.pop(0, None)
        assert painted == {segment["id"]: segment["area"] for segment in item["segments_info"]}


def spoil_camvid(root: Path) -> None:
    ids = miniatures.boxed(fill=11)
    miniatures.labels(root / "one_a" / "labels" / "1_one_a.png", ids, palette=True)


def grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


BAD = [
    ("CamVidStream", "camvid", lambda r: (r / "index.json").unlink(), "index.json is missing; expected"),
    ("CamVidStream", "camvid", lambda r: (r / "one_a/frames/2_one_a.jpg").unlink(), "lacks 1 of 3 frames.*2_one_a.jpg"),
    ("CamVidStream", "camvid", lambda r: (r / "two_b/labels/2_two_b.png").unlink(), "lacks 1 of 2 labels.*2_two_b.png"),
    ("CamVidStream", "camvid", spoil_camvid, "1_one_a.png holds class id 11; expected 0..10 or 255"),
    ("CamVidStream", "camvid", lambda r: miniatures.panoptic(r / "one_a/labels/1_one_a.png", miniatures.boxed()),
     "labels in mode RGB.*1_one_a.png; expected P or L"),
    ("CamVidStream", "camvid", lambda r: miniatures.picture(r / "one_a/frames/1_one_a.jpg", size=(12, 16)),
     "labels of another size than their frame.*1_one_a.png"),
    ("CamVidStream", "camvid", lambda r: (r / "one_a/frames/1_one_a.jpg").write_bytes(b"no image"),
     "1_one_a.jpg cannot be read as a picture"),
    ("KittiStep", "kitti_step", lambda r: (r / "images/val/0002/000001.png").unlink(), "0002 lacks 1 of 3 frames"),
    ("KittiStep", "kitti_step", lambda r: grey(r / "panoptic_maps/val/0006/000001.png"),
     "mode L.*0006/000001.png; expected RGB, semantic id in red"),
    ("KittiStep", "kitti_step", lambda r: (miniatures.picture(r / "images/val/0002/000001.png", size=(12, 16)),
     miniatures.panoptic(r / "panoptic_maps/val/0002/000001.png", miniatures.boxed(size=(12, 16)))),
     "mixes frame sizes: 1 of 3 frames are not 24 x 32"),
    ("KittiStep", "kitti_step", lambda r: (r / "panoptic_maps/val/0007").mkdir(), "video 0007 has no frames"),
    ("CocoVideos", "coco_videos", lambda r: (r / "raw_images/bar/bar_10.png").unlink(), "lacks 1 of 11 frames.*bar_10"),
    ("CocoVideos", "coco_videos", lambda r: miniatures.picture(r / "raw_images/bar/bar_12.png"),
     "lacks 1 of 12 labels.*panoptic_images/bar/bar_12.png"),
    ("CocoVideos", "coco_videos", lambda r: (r / "annotations/val/bar.json").write_text("{}"),
     "bar.json is not COCO's panoptic JSON"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("kind", "maker", "spoil", "message"), BAD)
def test_a_bad_tree_is_refused_with_the_file_and_the_fix(scope, tmp_path, kind, maker, spoil, message):
    root = getattr(miniatures, maker)(tmp_path)
    spoil(root)
    with pytest.raises(DataError, match=message):
        build(kind, root)


@both
@pytest.mark.parametrize("kind", ["CamVidStream", "KittiStep", "CocoVideos"])
def test_an_empty_folder_is_refused(scope, tmp_path, kind):
    with pytest.raises(DataError, match="missing"):
        build(kind, tmp_path)


@mmdet
def test_annotations_that_miss_a_frame_are_refused(scope, tmp_path):
    root = miniatures.coco_videos(tmp_path)
    file = root / "annotations/val/bar.json"
    data = json.loads(file.read_text())
    del data["annotations"][3]
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"bar.json annotates no frame 4, 1 of 11"):
        build("CocoVideos", root)


@both
@pytest.mark.parametrize(("colour", "message"), [
    ((19, 0, 0), "holds class id 19; expected 0..18 or 255"),
    ((PERSON, 0, 3), None),
    ((SKY, 0, 3), "numbers an instance of sky; only person and car have instances"),
])  # fmt: skip
def test_kitti_labels_of_another_encoding_are_refused_when_read(scope, tmp_path, colour, message):
    root = miniatures.kitti_step(tmp_path)
    file = root / "panoptic_maps/val/0002/000000.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0] = colour
    Image.fromarray(pixels).save(file)
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadKittiStepAnnotations"}]
    dataset = build("KittiStep", root, task="panoptic", pipeline=pipeline)
    if message is None:
        assert len(dataset[0]["gt_bboxes_labels"]) == 4
        return
    with pytest.raises(DataError, match=message):
        dataset[0]


@mmdet
def test_a_listed_segment_without_pixels_is_refused(scope, tmp_path):
    dataset = build("CocoVideos", miniatures.coco_videos(tmp_path), task="panoptic", pipeline=PANOPTIC)
    miniatures.panoptic(tmp_path / "panoptic_images/bar/bar_1.png", miniatures.boxed())
    with pytest.raises(DataError, match="bar_1.png has no pixel of the listed segment 70000"):
        dataset[0]


@both
def test_unknown_settings_are_refused(scope, tmp_path):
    root = miniatures.kitti_step(tmp_path)
    with pytest.raises(ConfigError, match="task is 'instance'"):
        build("KittiStep", root, task="instance")
    with pytest.raises(ConfigError, match="split is 'test'"):
        build("KittiStep", root, split="test")
    with pytest.raises(DataError, match="no video 0099 in"):
        build("KittiStep", root, videos=["0099"])
    with pytest.raises(DataError, match="videos must differ"):
        build("KittiStep", root, videos=["0002", "0002"])
    with pytest.raises(DataError, match="list of names, got the text '0002'"):
        build("KittiStep", root, videos="0002")
