"""Small trees in the formats of the data sets, made by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

HEIGHT, WIDTH = 24, 32
PERSON, CAR, ROAD, SKY = 11, 13, 0, 10


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def labels(path: Path, ids: np.ndarray, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    image.save(path)
    return path


def panoptic(path: Path, ids: np.ndarray) -> Path:
    """Segment ids [H, W] as R + 256 G + 65536 B."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1)
    Image.fromarray(colour.astype(np.uint8)).save(path)
    return path


def boxed(*boxes: tuple[int, int, int, int, int], fill: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """An id map: a background with boxes (x1, y1, x2, y2, id) painted over it in order."""
    ids = np.full(size, fill, np.int64)
    for x1, y1, x2, y2, value in boxes:
        ids[y1:y2, x1:x2] = value
    return ids


def camvid(root: Path, clips: dict[str, int] | None = None) -> Path:
    """CamVid: frames named so that their text order is not their true one."""
    entries = []
    for clip, count in (clips or {"one_a": 3, "two_b": 2}).items():
        frames = []
        for number in range(count):
            stem = f"{count - number}_{clip}"  # the index alone knows the order
            picture(root / clip / "frames" / f"{stem}.jpg", seed=number)
            ids = boxed((0, 0, 8, 8, 8), (8, 0, 16, 4, 255), fill=number % 11)
            labels(root / clip / "labels" / f"{stem}.png", ids, palette=True)
            frames.append({"frame": f"{stem}.jpg", "label": f"{stem}.png", "t": float(number)})
        entries.append({"clip": clip, "frames": frames})
    names = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car"]
    names += ["Pedestrian", "Bicyclist"]
    (root / "index.json").write_text(json.dumps({"classes": names, "ignore": 255, "clips": entries}))
    return root


def step_colour(semantic: np.ndarray, instance: np.ndarray) -> np.ndarray:
    """KITTI-STEP's colours: semantic id, instance id // 256, instance id % 256."""
    return np.stack([semantic, instance // 256, instance % 256], -1).astype(np.uint8)


def step_label(path: Path) -> Path:
    """A label: sky over road, void, two cars (instances 7 and 300), one person (5), a crowd of persons."""
    semantic = boxed(
        (0, 0, 32, 8, SKY),
        (0, 22, 32, 24, 255),
        (2, 10, 10, 16, CAR),
        (12, 10, 20, 18, CAR),
        (22, 9, 25, 17, PERSON),
        (26, 9, 32, 13, PERSON),
        fill=ROAD,
    )
    instance = boxed((2, 10, 10, 16, 7), (12, 10, 20, 18, 300), (22, 9, 25, 17, 5))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(step_colour(semantic, instance)).save(path)
    return path


def kitti_step(root: Path, split: str = "val", videos: dict[str, int] | None = None) -> Path:
    for video, count in (videos or {"0002": 3, "0006": 2}).items():
        for number in range(count):
            picture(root / "images" / split / video / f"{number:06d}.png", seed=number)
            step_label(root / "panoptic_maps" / split / video / f"{number:06d}.png")
    return root


def segment(ids: np.ndarray, number: int, category: int, crowd: int = 0) -> dict:
    """A segment of COCO Videos: COCO's panoptic form with a segmentation."""
    mask = ids == number
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "category_id": category,
        "iscrowd": crowd,
        "bbox": [float(value) for value in rle.toBbox(code)],
        "area": int(mask.sum()),
        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
    }


def video_frame() -> tuple[np.ndarray, list[dict]]:
    """Two persons, a crowd of dogs, a wall (stuff), an ignored region, and pixels without a segment."""
    ids = boxed((2, 2, 10, 14, 70000), (12, 2, 18, 10, 301), (20, 2, 28, 8, 9), (0, 16, 32, 22, 500))
    ids[10:16, 24:32] = 7
    segments = [
        segment(ids, 70000, 1),
        segment(ids, 301, 1),
        segment(ids, 9, 18, crowd=1),
        segment(ids, 500, 199),
        segment(ids, 7, 255),
    ]
    return ids, segments


def coco_categories(things_only: bool = False) -> list[dict]:
    from mmdet.datasets import CocoPanopticDataset

    from ttt_adapt_openmmlab.datasets.coco_videos import STUFF_IDS, THING_IDS

    names = CocoPanopticDataset.METAINFO["classes"]
    ids = THING_IDS if things_only else (*THING_IDS, *STUFF_IDS)
    return [{"id": i, "name": names[n], "isthing": int(n < 80)} for n, i in enumerate(ids)]


def coco_videos(root: Path, split: str = "val", videos: dict[str, int] | None = None) -> Path:
    """COCO Videos, with more than nine frames so that text order differs from the order of the numbers."""
    for video, count in (videos or {"bar": 11, "tokyo": 2}).items():
        images, annotations = [], []
        for number in range(1, count + 1):
            ids, segments = video_frame()
            name = f"{video}_{number}.png"
            picture(root / "raw_images" / video / name, seed=number)
            panoptic(root / "panoptic_images" / video / name, ids)
            labels(root / "semantic_images" / video / name, np.zeros((HEIGHT, WIDTH)))
            images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
        data = {"images": images, "annotations": annotations, "categories": coco_categories()}
        file = root / "annotations" / split / f"{video}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return root


def cityscapes(root: Path, count: int = 2) -> Path:
    for split in ("train", "val"):
        for number in range(count):
            stem = f"aachen_{number:06d}_000019"
            picture(root / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png", seed=number)
            target = root / "gtFine" / split / "aachen" / f"{stem}_gtFine_labelTrainIds.png"
            labels(target, boxed((0, 0, 8, 8, 18), (8, 0, 16, 8, 255)))
    return root


def coco(root: Path, count: int = 3) -> Path:
    """COCO in one folder: images, instances.json, panoptic.json, panoptic."""
    images, segments, instances = [], [], []
    for number in range(1, count + 1):
        ids, items = video_frame()
        items = [item for item in items if item["category_id"] != 255]
        ids[ids == 7] = 0
        stem = f"{number:012d}"
        picture(root / "images" / f"{stem}.jpg", seed=number)
        panoptic(root / "panoptic" / f"{stem}.png", ids)
        images.append({"id": number, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH})
        plain = [{key: value for key, value in item.items() if key != "segmentation"} for item in items]
        segments.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": plain})
        things = [item for item in items if item["category_id"] <= 90]
        instances += [{**item, "id": 10 * number + i, "image_id": number} for i, item in enumerate(things)]
    for name, notes, only in (("instances", instances, True), ("panoptic", segments, False)):
        data = {"images": images, "annotations": notes, "categories": coco_categories(things_only=only)}
        (root / f"{name}.json").write_text(json.dumps(data))
    return root
