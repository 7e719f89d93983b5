"""Checking a downloaded data set: nothing to say about a good one, names and counts about a bad one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniatures
from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab import check_tree
from ttt_adapt_openmmlab.datasets import kitti_step as kitti

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))


def whole_kitti(root: Path) -> Path:
    miniatures.kitti_step(root, "train", dict.fromkeys(kitti.PAPER_TEST, 1))
    return miniatures.kitti_step(root, "val", dict.fromkeys(kitti.PAPER_VAL, 2))


def coco2017(root: Path) -> Path:
    """COCO in its own layout."""
    for split in ("train2017", "val2017"):
        source = miniatures.coco(root / split)
        (root / "annotations" / f"panoptic_{split}").mkdir(parents=True)
        for image in (source / "images").iterdir():
            image.rename(source / image.name)
        (source / "images").rmdir()
        for image in (source / "panoptic").iterdir():
            image.rename(root / "annotations" / f"panoptic_{split}" / image.name)
        for name in ("instances", "panoptic"):
            (source / f"{name}.json").rename(root / "annotations" / f"{name}_{split}.json")
    return root


MAKERS = {
    "camvid": miniatures.camvid,
    "kitti-step": whole_kitti,
    "coco-videos": miniatures.coco_videos,
    "cityscapes": miniatures.cityscapes,
    "coco": miniatures.coco,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_good_tree_has_no_problem(tmp_path, kind):
    assert check_tree(kind, MAKERS[kind](tmp_path)) == []


def test_coco_in_its_own_layout_has_no_problem(tmp_path):
    assert check_tree("coco", coco2017(tmp_path)) == []


@pytest.mark.parametrize(("kind", "folder"), [("camvid", "camvid"), ("coco", "coco100")])
def test_the_real_data_have_no_problem(kind, folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"no real data in {DATA / folder}")
    assert check_tree(kind, DATA / folder) == []


@pytest.mark.parametrize("kind", MAKERS)
def test_a_missing_and_an_empty_folder_are_told_the_layout(tmp_path, kind):
    for root in (tmp_path, tmp_path / "absent"):
        problems = check_tree(kind, root)
        assert problems
        assert all(str(root) in problem and "expected" in problem for problem in problems)


def recolour(file: Path, colour: tuple[int, int, int]) -> None:
    pixels = np.array(Image.open(file))
    pixels[0, 0] = colour
    Image.fromarray(pixels).save(file)


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def drop_segmentations(data: dict) -> None:
    for item in data["annotations"][:2]:
        for segment in item["segments_info"]:
            segment.pop("segmentation", None)


def rename_labels(root: Path) -> None:
    for file in (root / "gtFine/val").rglob("*_labelTrainIds.png"):
        file.rename(file.with_name(file.name.replace("TrainIds", "Ids")))


CITY = "val/aachen/aachen_000001_000019"
PNG = "panoptic/000000000002.png"
BAD = [
    ("camvid", lambda r: (r / "one_a/frames/2_one_a.jpg").unlink(),
     ["video one_a lacks 1 of 3 frames: .*2_one_a.jpg; get them again"]),
    ("camvid", lambda r: miniatures.labels(r / "two_b/labels/1_two_b.png", miniatures.boxed(fill=12)),
     ["video two_b has 1 of 2 labels with wrong content: .*1_two_b.png holds class id 12; expected 0..10"]),
    ("kitti-step", lambda r: (r / "images/val/0007/000000.png").unlink(), ["video 0007 lacks 1 of 2 frames"]),
    ("kitti-step", lambda r: [f.unlink() for f in (r / "images/val/0007").iterdir()], ["0007 lacks 2 of 2 frames"]),
    ("kitti-step", lambda r: recolour(r / "panoptic_maps/val/0002/000001.png", (0, 0, 4)),
     ["0002 has 1 of 2 labels with wrong content: .*000001.png numbers an instance of road"]),
    ("coco-videos", lambda r: (r / "panoptic_images/tokyo/tokyo_2.png").unlink(), ["tokyo lacks 1 of 2 labels"]),
    ("coco-videos", lambda r: edit(r / "annotations/val/bar.json", lambda d: d["annotations"].pop(2)),
     ["bar.json annotates no frame 3, 1 of 11"]),
    ("coco-videos", lambda r: edit(r / "annotations/val/bar.json", drop_segmentations),
     ["bar.json has 8 thing segments without segmentation"]),
    ("coco-videos", lambda r: edit(r / "annotations/val/bar.json",
     lambda d: d["annotations"][0]["segments_info"][0].update(category_id=12)), ["category 12; expected COCO's 133"]),
    ("coco-videos", lambda r: recolour(r / "panoptic_images/bar/bar_3.png", (1, 2, 3)),
     ["video bar has 1 panoptic images that do not fit .*bar_3.png has pixels of segment 197121, which is not listed"]),
    ("cityscapes", lambda r: (r / f"gtFine/{CITY}_gtFine_labelTrainIds.png").unlink(), ["lacks 1 of 2 labels"]),
    ("cityscapes", rename_labels, ["lacks 2 labelTrainIds files.*csCreateTrainIdLabelImgs"]),
    ("coco", lambda r: (r / "images/000000000001.jpg").unlink(),
     ["images lacks 1 of the 3 images of instances.json", "images lacks 1 of the 3 images of panoptic.json"]),
    ("coco", lambda r: (r / PNG).unlink(), ["panoptic lacks 1 of 3 panoptic images: .*000000000002.png"]),
    ("coco", lambda r: miniatures.labels(r / PNG, miniatures.boxed()),
     ["1 panoptic images that do not fit .*000000000002.png has mode L; expected RGB"]),
    ("coco", lambda r: miniatures.panoptic(r / PNG, miniatures.boxed()),
     ["1 panoptic images that do not fit .*000000000002.png has no pixel of segment 9"]),
    ("coco", lambda r: (r / "instances.json").write_text("{"), ["instances.json is not JSON"]),
    ("coco", lambda r: shutil.copy(r / "instances.json", r / "panoptic.json"),
     ["panoptic.json has annotations without file_name, segments_info; expected COCO's panoptic annotations: put the"]),
    ("coco", lambda r: shutil.copy(r / "panoptic.json", r / "instances.json"),
     ["instances.json has annotations without category_id, bbox, segmentation; expected COCO's instance annotations"]),
    ("coco", lambda r: edit(r / "panoptic.json", lambda d: d["annotations"][1].pop("segments_info")),
     ["panoptic.json has annotations without segments_info"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil", "messages"), BAD)
def test_a_problem_is_named_with_its_count_and_file_and_no_other_is(tmp_path, kind, spoil, messages):
    root = MAKERS[kind](tmp_path)
    spoil(root)
    problems = check_tree(kind, root)
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert re.search(message, problem)


def test_all_problems_are_listed_at_once(tmp_path):
    root = miniatures.camvid(tmp_path)
    (root / "one_a/frames/2_one_a.jpg").unlink()
    (root / "two_b/labels/1_two_b.png").unlink()
    assert len(check_tree("camvid", root)) == 2


def test_a_part_of_kitti_step_is_told_which_sequences_are_missing(tmp_path):
    problems = check_tree("kitti-step", miniatures.kitti_step(tmp_path, videos={"0002": 1, "0006": 1}))
    assert len(problems) == 2
    assert problems[0].startswith("7 of the 9 sequences of")
    assert "0007, 0008, 0010, 0013, 0014, 0016, 0018" in problems[0]
    assert str(tmp_path / "images" / "train") in problems[1]


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no data set 'kitti'; expected one of camvid, kitti-step, coco-videos"):
        check_tree("kitti", tmp_path)
