"""Metrics of streams, against upstream's own code, hand-computed numbers and slow references."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from pycocotools import mask as rle

import miniatures
import tiny
import ttt_adapt_openmmlab  # noqa: F401
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.label_images import read_segment_ids
from ttt_adapt_openmmlab.metrics import StreamAPMetric, StreamIoUMetric, StreamPQMetric
from ttt_adapt_openmmlab.metrics.panoptic import panoptic_counts, panoptic_quality

DATA = Path(os.environ.get("TTT_ADAPT_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))
real_coco = pytest.mark.skipif(not (DATA / "coco100").is_dir(), reason=f"no real images in {DATA / 'coco100'}")
NAMES = ("a", "b", "c", "d", "e")


def seg_sample(video, frame, prediction, truth):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo={"img_path": f"/x/{video}/{frame}.png", "video_id": video, "frame_id": frame})
    sample.pred_sem_seg = PixelData(data=torch.as_tensor(prediction)[None])
    sample.gt_sem_seg = PixelData(data=torch.as_tensor(truth)[None])
    return sample


def evaluate(metric, samples, meta):
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = meta
    for sample in samples:
        evaluator.process([sample])
    return evaluator.evaluate(len(samples))


def scene(seed, classes=5, shape=(20, 30)):
    """Random labels with void, and a prediction that is mostly right."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, shape)
    wrong = random.random(shape) < 0.4
    prediction = np.where(wrong, random.integers(0, classes, shape), truth)
    return prediction, np.where(random.random(shape) < 0.1, 255, truth)


def slow_iou(pairs, classes, count):
    """Mean IoU over the classes for which count(in truth, in prediction) holds, pixel by pixel."""
    inter, union, there, guessed = ([0] * classes for _ in range(4))
    for prediction, truth in pairs:
        for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t == 255:
                continue
            there[t] += 1
            guessed[p] += 1
            if p == t:
                inter[t] += 1
                union[t] += 1
            else:
                union[t] += 1
                union[p] += 1
    values = [inter[c] / union[c] for c in range(classes) if count(there[c], guessed[c])]
    return 100 * sum(values) / len(values)


def present(there, guessed):
    return there > 0


def either(there, guessed):
    return there + guessed > 0


@pytest.fixture
def two_videos():
    """Three frames of video v, one of w; class 4 is absent from w's ground truth and predicted there."""
    pairs = {("v", i): scene(i) for i in range(3)}
    prediction, truth = scene(9, classes=4)
    prediction[0, 0] = 4
    pairs["w", 0] = prediction, truth
    return pairs


def test_miou_is_that_of_mmsegmentation_and_of_a_pixel_by_pixel_count(two_videos):
    from mmseg.evaluation import IoUMetric

    samples = [seg_sample(*place, *pair) for place, pair in two_videos.items()]
    meta = {"classes": NAMES}
    ours = evaluate(StreamIoUMetric(), samples, meta)
    upstream = evaluate(IoUMetric(), samples, meta)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert ours[f"stream/{name}"] == pytest.approx(upstream[name], abs=0.00501)
    pairs = list(two_videos.values())
    assert ours["stream/mIoU"] == pytest.approx(slow_iou(pairs, 5, either), abs=1e-4)
    assert ours["stream/mIoU_present"] == pytest.approx(slow_iou(pairs, 5, present), abs=1e-4)


@pytest.mark.parametrize(("name", "counted"), [("mIoU", either), ("mIoU_present", present)])
def test_miou_over_frames_and_videos_are_the_means_of_what_the_name_says(two_videos, name, counted):
    samples = [seg_sample(*place, *pair) for place, pair in two_videos.items()]
    scores = evaluate(StreamIoUMetric(), samples, {"classes": NAMES})
    frames = {place: slow_iou([pair], 5, counted) for place, pair in two_videos.items()}
    videos = {v: slow_iou([p for place, p in two_videos.items() if place[0] == v], 5, counted) for v in "vw"}
    assert scores[f"stream/{name}_frames"] == pytest.approx(np.mean(list(frames.values())), abs=1e-4)
    assert scores[f"stream/{name}_videos"] == pytest.approx((3 * videos["v"] + videos["w"]) / 4, abs=1e-4)
    assert scores[f"stream/v/{name}"] == pytest.approx(videos["v"], abs=1e-4)
    assert scores[f"stream/v/{name}_frames"] == pytest.approx(np.mean([frames["v", i] for i in range(3)]), abs=1e-4)
    assert scores[f"stream/w/{name}"] == pytest.approx(frames["w", 0], abs=1e-4)


def test_one_wrong_pixel_of_an_absent_class_costs_no_class_among_those_present():
    truth = np.zeros((10, 10), int)
    prediction = truth.copy()
    prediction[0, 0] = 1
    scores = evaluate(StreamIoUMetric(), [seg_sample("v", 0, prediction, truth)], {"classes": NAMES})
    assert scores["stream/mIoU_present_frames"] == pytest.approx(99.0)
    for name in ("mIoU", "mIoU_frames"):  # upstream's reading: the absent class counts with IoU 0
        assert scores[f"stream/{name}"] == pytest.approx(49.5)


def test_frames_without_a_labelled_pixel_are_left_out_and_nothing_but_such_frames_is_nan():
    void = np.full((10, 10), 255)
    truth = np.zeros((10, 10), int)
    samples = [seg_sample("v", 0, truth, void), seg_sample("v", 1, truth, truth)]
    assert evaluate(StreamIoUMetric(), samples, {"classes": NAMES})["stream/mIoU_frames"] == 100.0
    scores = evaluate(StreamIoUMetric(), samples[:1], {"classes": NAMES})
    assert math.isnan(scores["stream/mIoU"])
    assert math.isnan(scores["stream/mIoU_frames"])


def test_areas_of_long_videos_are_added_without_rounding():
    """float32 cannot count 2^24 + 1 pixels."""
    metric = StreamIoUMetric()
    metric.dataset_meta = {"classes": NAMES[:2]}
    big = np.array([[2.0**24, 0], [2.0**24, 1], [2.0**24, 0], [2.0**24, 1]])
    one = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    scores = metric.score([big, one])
    assert scores["aAcc"] == pytest.approx(100 * (2**24 + 1) / (2**24 + 2), abs=1e-9)


def test_scores_do_not_depend_on_the_order_or_on_repeated_frames(two_videos):
    samples = [seg_sample(*place, *pair) for place, pair in two_videos.items()]
    meta = {"classes": NAMES}
    scores = evaluate(StreamIoUMetric(), samples, meta)
    assert evaluate(StreamIoUMetric(), [*samples[::-1], samples[1]], meta) == scores


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda s: s.gt_sem_seg.data.fill_(5), "v/0.png is labelled with class 5; expected 0..4 or 255"),
    (lambda s: delattr(s, "gt_sem_seg"), "v/0.png comes without gt_sem_seg; put LoadAnnotations behind Resize"),
    (lambda s: setattr(s, "pred_sem_seg", PixelData(data=torch.zeros(1, 4, 4))), "predicted as 4 x 4.*20 x 30"),
])  # fmt: skip
def test_ground_truth_that_does_not_fit_is_refused(spoil, message):
    sample = seg_sample("v", 0, *scene(0))
    spoil(sample)
    with pytest.raises(DataError, match=message):
        evaluate(StreamIoUMetric(), [sample], {"classes": NAMES})


# Average precision


def det_sample(video, frame, truth, detections, shape=(40, 60), **metainfo):
    """The truth is (label, mask, ignored) of every instance; detections are (label, mask, score)."""
    from mmdet.structures import DetDataSample

    metainfo = {
        "img_path": f"/x/{video}/{frame}.png",
        "img_id": f"{video}/{frame}",
        "ori_shape": shape,
        "video_id": video,
        "frame_id": frame,
        **metainfo,
    }
    if truth is not None:
        metainfo["instances"] = [
            {"bbox": box(mask), "bbox_label": label, "ignore_flag": ignored, "mask": coded(mask)}
            for label, mask, ignored in truth
        ]
    sample = DetDataSample(metainfo=metainfo)
    masks = np.array([mask for _, mask, _ in detections], bool).reshape(-1, *shape)
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([box(mask) for mask in masks]).reshape(-1, 4).float(),
        labels=torch.tensor([label for label, _, _ in detections], dtype=torch.long),
        scores=torch.tensor([score for _, _, score in detections]),
        masks=torch.from_numpy(masks),
    )
    return sample


def box(mask):
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def coded(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def rect(x1, y1, x2, y2, shape=(40, 60)):
    mask = np.zeros(shape, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def crowded(seed, count=6, classes=3):
    """Random boxes with noisy detections: (instances, detections)."""
    random = np.random.default_rng(seed)
    instances, detections = [], []
    for i in range(count):
        x, y, w, h = random.integers(0, 40), random.integers(0, 25), random.integers(5, 20), random.integers(5, 15)
        label = int(random.integers(0, classes))
        instances.append((label, rect(x, y, x + w, y + h), int(i == 0)))
        for _ in range(random.integers(0, 3)):
            dx, dy = random.integers(0, 4, 2)
            guess = label if random.random() < 0.8 else int(random.integers(0, classes))
            detections.append((guess, rect(x + dx, y + dy, x + w + dx, y + h), float(random.random())))
    return instances, detections


MEANS = {"classes": NAMES[:3]}


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_ap_is_that_of_mmdetections_coco_metric(kind):
    from mmdet.evaluation import CocoMetric

    samples = [det_sample("v", i, *crowded(i)) for i in range(6)]
    ours = evaluate(StreamAPMetric(metric=["segm", "bbox"]), samples, MEANS)
    upstream = evaluate(CocoMetric(metric=["segm", "bbox"]), samples, MEANS)
    for name in ("mAP", "mAP_50", "mAP_75"):
        assert ours[f"stream/{kind}_{name}"] == pytest.approx(100 * upstream[f"coco/{kind}_{name}"], abs=0.0501)
    assert 5 < ours[f"stream/{kind}_mAP"] < 95


def test_ap_over_frames_is_the_mean_of_mmdetections_ap_of_single_frames_that_have_instances():
    from mmdet.evaluation import CocoMetric

    samples = [det_sample("v", i, *crowded(i, count=3)) for i in range(4)]
    empty = det_sample("v", 4, [], crowded(9)[1])
    crowd_only = det_sample("v", 5, [(0, rect(0, 0, 20, 20), 1)], crowded(9)[1])
    ours = evaluate(StreamAPMetric(), [*samples, empty, crowd_only], MEANS)
    single = [100 * evaluate(CocoMetric(metric="segm"), [sample], MEANS)["coco/segm_mAP"] for sample in samples]
    assert ours["stream/segm_mAP_frames"] == pytest.approx(np.mean(single), abs=0.0501)
    assert ours["stream/segm_mAP_frames"] != pytest.approx(ours["stream/segm_mAP"], abs=0.1)


def test_ap_of_a_hand_computed_frame():
    """One instance found exactly at score 0.9, one missed: precision 1 up to recall 0.5, i.e. 51 of 101 points."""
    a, b = rect(0, 0, 10, 10), rect(20, 20, 30, 30)
    scores = evaluate(StreamAPMetric(), [det_sample("v", 0, [(0, a, 0), (0, b, 0)], [(0, a, 0.9)])], MEANS)
    assert scores["stream/segm_mAP"] == pytest.approx(100 * 51 / 101)
    false_first = [(0, rect(40, 0, 50, 10), 0.95), (0, a, 0.9)]
    scores = evaluate(StreamAPMetric(), [det_sample("v", 0, [(0, a, 0), (0, b, 0)], false_first)], MEANS)
    assert scores["stream/segm_mAP"] == pytest.approx(100 * 0.5 * 51 / 101)


@pytest.mark.parametrize("label", [0, -1])
def test_detections_in_a_crowd_or_in_void_are_no_false_positives(label):
    a, region = rect(0, 0, 10, 10), rect(30, 0, 60, 40)
    detections = [(0, rect(35, 5, 45, 15), 0.95), (0, a, 0.9)]
    ignored = det_sample("v", 0, [(0, a, 0), (label, region, 1)], detections)
    counted = det_sample("v", 0, [(0, a, 0)], detections)
    assert evaluate(StreamAPMetric(), [ignored], MEANS)["stream/segm_mAP"] == pytest.approx(100)
    assert evaluate(StreamAPMetric(), [counted], MEANS)["stream/segm_mAP"] == pytest.approx(50)


def test_a_crowd_excuses_its_own_class_only():
    a, region = rect(0, 0, 10, 10), rect(30, 0, 60, 40)
    sample = det_sample("v", 0, [(0, a, 0), (1, region, 1)], [(0, rect(35, 5, 45, 15), 0.95), (0, a, 0.9)])
    assert evaluate(StreamAPMetric(), [sample], MEANS)["stream/segm_mAP"] == pytest.approx(50)


def test_stuff_is_left_out_of_instances_and_detections():
    meta = {"classes": NAMES, "thing_classes": NAMES[:2], "stuff_classes": NAMES[2:]}
    a, b = rect(0, 0, 10, 10), rect(20, 20, 30, 30)
    sample = det_sample("v", 0, [(0, a, 0), (3, b, 0)], [(0, a, 0.9), (3, a, 0.95)])
    assert evaluate(StreamAPMetric(), [sample], meta)["stream/segm_mAP"] == pytest.approx(100)


def test_nothing_detected_is_zero_and_no_instance_at_all_is_nan():
    sample = det_sample("v", 0, [(0, rect(0, 0, 10, 10), 0)], [])
    assert evaluate(StreamAPMetric(metric=["segm", "bbox"]), [sample], MEANS)["stream/bbox_mAP"] == 0
    assert math.isnan(evaluate(StreamAPMetric(), [det_sample("v", 0, [], [])], MEANS)["stream/segm_mAP"])


def test_instances_of_a_panoptic_image_equal_those_given_as_masks(tmp_path):
    """Void, a crowd and stuff included."""
    file, segments, truth = panoptic_truth(tmp_path, 3)
    meta = {"classes": NAMES, "thing_classes": NAMES[:2], "stuff_classes": NAMES[2:]}
    detections = [(label, mask, score) for label, mask, score in crowded(3, classes=2)[1]]
    whole = det_sample("v", 0, None, detections, segments_info=segments, seg_map_path=str(file))
    instances = [
        (item["category"], truth == item["id"], int(not item["is_thing"])) for item in segments if item["category"] < 2
    ]
    instances.append((-1, ~np.isin(truth, [item["id"] for item in segments]), 1))
    listed = det_sample("v", 0, instances, detections)
    for kind in ("segm", "bbox"):
        scores = [evaluate(StreamAPMetric(metric=kind), [sample], meta) for sample in (whole, listed)]
        assert scores[0] == pytest.approx(scores[1], nan_ok=True, abs=0)
        assert scores[0][f"stream/{kind}_mAP"] > 0


@real_coco
def test_ap_on_coco_is_what_pycocotools_summarizes_on_the_annotation_file():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file = DATA / "coco100" / "instances.json"
    truth = COCO(str(file))
    meta, samples, results = {"classes": NAMES * 16}, [], []
    labels = {category: i for i, category in enumerate(sorted(truth.getCatIds()))}
    random = np.random.default_rng(0)

    def guess(note):
        moved = np.roll(truth.annToMask(note), random.integers(0, 12), 1)
        return labels[note["category_id"]], moved > 0, random.random()

    for image in truth.loadImgs(sorted(truth.getImgIds())[:12]):
        shape = image["height"], image["width"]
        notes = truth.loadAnns(truth.getAnnIds([image["id"]]))
        detections = [guess(note) for note in notes]
        instances = [
            {
                "bbox": [*note["bbox"][:2], *np.add(note["bbox"][:2], note["bbox"][2:])],
                "bbox_label": labels[note["category_id"]],
                "ignore_flag": note["iscrowd"],
                "mask": note["segmentation"],
            }
            for note in notes
        ]
        sample = det_sample("v", image["id"], None, detections, shape, instances=instances)
        samples.append(sample)
        for note, (_, mask, _), score in zip(notes, detections, sample.pred_instances.scores.tolist(), strict=True):
            place = {"image_id": image["id"], "category_id": note["category_id"]}
            results.append({**place, "score": score, "segmentation": coded(mask)})
    reference = COCOeval(truth, truth.loadRes(results), "segm")
    reference.params.imgIds = sorted(truth.getImgIds())[:12]
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    ours = evaluate(StreamAPMetric(), samples, meta)
    for i, name in enumerate(("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")):
        assert ours[f"stream/segm_{name}"] == pytest.approx(100 * reference.stats[i], abs=1e-6), name
    assert 20 < ours["stream/segm_mAP"] < 90


def test_ap_asks_for_what_it_lacks():
    with pytest.raises(ConfigError, match="metric is 'mask'; expected segm or bbox"):
        StreamAPMetric(metric="mask")
    with pytest.raises(DataError, match="comes without ground truth.*meta_keys of PackDetInputs"):
        evaluate(StreamAPMetric(), [det_sample("v", 0, None, [])], MEANS)
    sample = det_sample("v", 0, [], [])
    del sample.pred_instances
    with pytest.raises(DataError, match="instance_on=True"):
        evaluate(StreamAPMetric(), [sample], MEANS)


# Panoptic quality


def panoptic_truth(folder, seed, shape=(40, 60)):
    """A random panoptic image: things 0 and 1, stuff 2 to 4, a crowd, void. Returns file, segments, ids."""
    random = np.random.default_rng(seed)
    ids = np.zeros(shape, np.int64)
    ids[:, :50] = 5
    ids[20:, :50] = 6
    segments = [{"id": 5, "category": 2, "is_thing": False}, {"id": 6, "category": 3 + seed % 2, "is_thing": False}]
    for number in range(6):
        x, y, w, h = random.integers(0, 45), random.integers(0, 28), random.integers(6, 15), random.integers(6, 12)
        value = 1000 * (number + 1) + 7
        ids[y : y + h, x : x + w] = value
        segments.append({"id": value, "category": number % 2, "is_thing": number != 5})
    segments = [item for item in segments if (ids == item["id"]).any()]
    return miniatures.panoptic(folder / f"{seed}.png", ids), segments, ids


def guessed(segments, ids, seed, classes=5, void=True):
    """A prediction in mmdetection's form: shifted segments, some of another class, some void."""
    random = np.random.default_rng(seed)
    prediction = np.full(ids.shape, classes if void else 2, np.int64)
    for number, item in enumerate(segments):
        moved = np.roll(ids == item["id"], random.integers(0, 4), 1)
        label = item["category"] if random.random() < 0.8 else int(random.integers(0, classes))
        prediction[moved] = label + (1000 * (number + 1) if label < 2 else 0)
    return prediction


PANOPTIC = {"classes": NAMES, "thing_classes": NAMES[:2], "stuff_classes": NAMES[2:]}


def pan_sample(video, frame, file, segments, prediction):
    sample = det_sample(video, frame, None, [], segments_info=segments, seg_map_path=str(file))
    sample.pred_panoptic_seg = PixelData(sem_seg=torch.as_tensor(prediction)[None])
    return sample


class PQStat:
    """What mmdetection's counting needs of panopticapi: a record of iou, tp, fp and fn per category."""

    class Record:
        def __init__(self):
            self.iou, self.tp, self.fp, self.fn = 0.0, 0, 0, 0

    def __init__(self):
        self.records = {}

    def __getitem__(self, category):
        return self.records.setdefault(category, self.Record())


def official_counts(monkeypatch, folder, file, segments, prediction, classes=5):
    """mmdetection's `pq_compute_single_core`, which is panopticapi's counting."""
    from mmdet.evaluation.functional import panoptic_utils

    def to_ids(colour):
        colour = colour.astype(np.int64)
        return colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2]

    monkeypatch.setattr(panoptic_utils, "PQStat", PQStat)
    monkeypatch.setattr(panoptic_utils, "rgb2id", to_ids)
    ids = np.where(prediction % 1000 == classes, 0, prediction + 1)  # 0 is void in a PNG
    guess = miniatures.panoptic(folder / "guess" / file.name, ids)
    truth = to_ids(np.asarray(miniatures.Image.open(file)))
    things = {0, 1}
    notes = [
        {
            "id": item["id"],
            "category_id": item["category"],
            "iscrowd": int(item["category"] in things and not item["is_thing"]),
            "area": int((truth == item["id"]).sum()),
        }
        for item in segments
    ]
    found = [{"id": int(i), "category_id": int(i - 1) % 1000} for i in np.unique(ids) if i]
    stat = panoptic_utils.pq_compute_single_core(
        0,
        [
            (
                {"image_id": 0, "file_name": file.name, "segments_info": notes},
                {"file_name": guess.name, "segments_info": found},
            )
        ],
        str(folder),
        str(guess.parent),
        {label: {} for label in range(classes)},
    )
    return np.array([[getattr(stat[c], name) for c in range(classes)] for name in ("iou", "tp", "fp", "fn")])


def test_pq_counts_are_those_of_mmdetections_coco_panoptic_metric(tmp_path, monkeypatch):
    metric = StreamPQMetric()
    metric.dataset_meta = PANOPTIC
    seen = np.zeros((4, 5))
    for seed in range(12):
        file, segments, ids = panoptic_truth(tmp_path, seed)
        prediction = guessed(segments, ids, seed)
        counts = metric.measure(pan_sample("v", seed, file, segments, prediction).to_dict())
        np.testing.assert_allclose(counts, official_counts(monkeypatch, tmp_path, file, segments, prediction))
        seen += counts
    assert (seen.sum(1) > 5).all()


def slow_pq(frames, group):
    """PQ, SQ, RQ from the definition: loops over pairs of segments."""
    stats = {}
    for counts in frames:
        for label in group:
            stats[label] = stats.get(label, 0) + counts[:, label]
    rows = []
    for iou, tp, fp, fn in stats.values():
        if tp + fp + fn:
            sq = iou / tp if tp else 0.0
            rq = tp / (tp + fp / 2 + fn / 2)
            rows.append((sq * rq, sq, rq))
    return [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_pq_readings_are_the_means_that_the_names_say(tmp_path, monkeypatch):
    samples, counts = [], {}
    for seed, video in enumerate("vvvww"):
        file, segments, ids = panoptic_truth(tmp_path, seed)
        prediction = guessed(segments, ids, seed)
        samples.append(pan_sample(video, seed, file, segments, prediction))
        counts.setdefault(video, []).append(official_counts(monkeypatch, tmp_path, file, segments, prediction))
    scores = evaluate(StreamPQMetric(), samples, PANOPTIC)
    every = [*counts["v"], *counts["w"]]
    for suffix, group in (("", range(5)), ("_th", (0, 1)), ("_st", (2, 3, 4))):
        expected = slow_pq(every, group)
        assert [scores[f"stream/{name}{suffix}"] for name in ("PQ", "SQ", "RQ")] == pytest.approx(expected)
    for i, name in enumerate(("PQ", "SQ", "RQ")):
        assert scores[f"stream/{name}_frames"] == pytest.approx(np.mean([slow_pq([c], range(5))[i] for c in every]))
        videos = [slow_pq(counts[video], range(5))[i] for video in "vw"]
        assert scores[f"stream/{name}_videos"] == pytest.approx((3 * videos[0] + 2 * videos[1]) / 5)
        assert scores[f"stream/v/{name}"] == pytest.approx(videos[0])


def test_pq_of_a_hand_computed_frame():
    """A row of 12 pixels: segment A (0..5) predicted as 0..3 and 6..7, void 8..11 predicted as class 0."""
    truth = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0]])
    guess = np.array([[1, 1, 1, 1, 9, 9, 1, 1, 1, 3, 3, 3]])
    counts = panoptic_counts(truth, [(1, 0, False), (2, 1, False)], guess, [(1, 0), (3, 0)], 2)
    # A: intersection 4, union 6 + 7 - 4 - 1 void = 8: IoU 0.5 is no match; segment 3 lies in void: not counted
    assert counts.tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]
    guess[0, 6] = 9
    counts = panoptic_counts(truth, [(1, 0, False), (2, 1, False)], guess, [(1, 0), (3, 0)], 2)
    assert counts == pytest.approx(np.array([[4 / 7, 0], [1, 0], [0, 0], [0, 1]]))
    assert panoptic_quality(counts, np.array([0])) == pytest.approx((4 / 7, 4 / 7, 1))
    assert panoptic_quality(counts, np.array([0, 1])) == pytest.approx((2 / 7, 2 / 7, 0.5))


@pytest.mark.parametrize(("inside", "false"), [(5, 1.0), (6, 0.0)])
def test_a_prediction_is_excused_only_by_more_than_half_in_void_or_in_crowds_of_its_class(inside, false):
    truth = np.zeros((1, 20), int)
    truth[0, 10:] = 1  # class 1
    guess = np.full((1, 20), 99)
    guess[0, 10 - inside : 20 - inside] = 7  # 10 pixels, `inside` of them in void
    assert panoptic_counts(truth, [(1, 1, False)], guess, [(7, 0)], 2)[2].tolist() == [false, 0]
    truth[0, :10] = 2
    crowd = [(1, 1, False), (2, 0, True)]
    assert panoptic_counts(truth, crowd, guess, [(7, 0)], 2)[2].tolist() == [false, 0]
    other = [(1, 0, False), (2, 1, True)]
    assert panoptic_counts(truth, other, guess, [(7, 0)], 2)[2].tolist() == [1, 0]


def test_torchmetrics_agrees_where_nothing_is_void_in_the_prediction_and_nothing_is_a_crowd(tmp_path):
    from torchmetrics.functional.detection import panoptic_quality as reference

    def colours(ids, segments):
        table = {number: (label, number if label < 2 else 0) for number, label in segments}
        return torch.tensor([[table.get(int(i), (9, 0)) for i in row] for row in ids])[None]

    for seed in range(4):
        _, segments, ids = panoptic_truth(tmp_path, seed)
        segments = [{**item, "is_thing": item["category"] < 2} for item in segments]
        prediction = guessed(segments, ids, seed, void=False)
        found = [(int(i), int(i) % 1000) for i in np.unique(prediction)]
        truth = [(item["id"], item["category"]) for item in segments]
        counts = panoptic_counts(ids, [(*item, False) for item in truth], prediction, found, 5)
        expected = reference(
            colours(prediction, found), colours(ids, truth), {0, 1}, {2, 3, 4}, allow_unknown_preds_category=True,
            return_sq_and_rq=True,
        )  # fmt: skip
        assert panoptic_quality(counts, np.arange(5)) == pytest.approx(expected.tolist())


def test_a_missed_segment_under_a_void_prediction_is_a_miss_and_torchmetrics_thinks_otherwise():
    """Why the definition is written here: void belongs to the ground truth alone."""
    from torchmetrics.functional.detection import panoptic_quality as reference

    truth, guess = np.array([[1, 1, 1, 1, 2, 2]]), np.array([[9, 9, 9, 9, 2, 2]])
    counts = panoptic_counts(truth, [(1, 0, False), (2, 0, False)], guess, [(2, 0)], 1)
    assert counts.tolist() == [[1], [1], [0], [1]]
    colours = [
        torch.tensor([[(0 if i < 9 else 5, int(i)) for i in row] for row in ids])[None] for ids in (guess, truth)
    ]
    assert reference(*colours, {0}, set(), allow_unknown_preds_category=True) == 1.0


@real_coco
def test_real_ground_truth_as_prediction_has_a_pq_of_100():
    data = json.loads((DATA / "coco100" / "panoptic.json").read_text())
    categories = data["categories"]
    labels = {item["id"]: i for i, item in enumerate(categories)}
    meta = {
        "classes": tuple(item["name"] for item in categories),
        "thing_classes": tuple(item["name"] for item in categories if item["isthing"]),
    }
    samples = []
    for number, note in enumerate(data["annotations"][:8]):
        file = DATA / "coco100" / "panoptic" / note["file_name"]
        ids = read_segment_ids(file)
        prediction, segments = np.full(ids.shape, 133), []
        for i, item in enumerate(note["segments_info"], start=1):
            label = labels[item["category_id"]]
            segments.append({"id": item["id"], "category": label, "is_thing": label < 80 and not item["iscrowd"]})
            prediction[ids == item["id"]] = label + (1000 * i if label < 80 else 0)
        samples.append(pan_sample("v", number, file, segments, prediction))
    scores = evaluate(StreamPQMetric(), samples, meta)
    assert scores["stream/PQ"] == scores["stream/PQ_frames"] == scores["stream/PQ_st"] == 100


def test_pq_asks_for_what_it_lacks(tmp_path):
    file, segments, ids = panoptic_truth(tmp_path, 0)
    with pytest.raises(DataError, match="segments_info and seg_map_path.*LoadPanopticSegments"):
        evaluate(StreamPQMetric(), [pan_sample("v", 0, file, None, ids)], PANOPTIC)
    with pytest.raises(DataError, match="predicted as 4 x 4 and labelled as 40 x 60"):
        evaluate(StreamPQMetric(), [pan_sample("v", 0, file, segments, np.zeros((4, 4)))], PANOPTIC)
    with pytest.raises(ConfigError, match="needs 'thing_classes' in the metainfo"):
        evaluate(StreamPQMetric(), [pan_sample("v", 0, file, segments, ids)], {"classes": NAMES})


# In MMEngine's Runner


class Oracle(BaseModel):
    """Predicts the ground truth, in the form of mmsegmentation's and mmdetection's models."""

    def __init__(self, classes=133, things=80):
        super().__init__()
        self.classes, self.things = classes, things

    def forward(self, inputs, data_samples=None, mode="tensor"):
        assert mode == "predict"
        return [self.answer(sample) for sample in data_samples]

    def answer(self, sample):
        if "segments_info" in sample.metainfo:
            ids = read_segment_ids(sample.metainfo["seg_map_path"])
            answer = np.full(ids.shape, self.classes)
            for i, item in enumerate(sample.metainfo["segments_info"], start=1):
                answer[ids == item["id"]] = item["category"] + 1000 * i * (item["category"] < self.things)
            sample.pred_panoptic_seg = PixelData(sem_seg=torch.from_numpy(answer)[None])
        if "gt_instances" in sample:
            truth = sample.gt_instances
            masks = torch.from_numpy(truth.masks.masks).bool()
            scores = torch.linspace(0.5, 0.9, len(masks))
            boxes = truth.bboxes.tensor
            sample.pred_instances = InstanceData(masks=masks, scores=scores, bboxes=boxes, labels=truth.labels)
        else:
            truth = sample.gt_sem_seg.data
            sample.pred_sem_seg = PixelData(data=torch.where(truth == 255, 0, truth))
        return sample


SEG_KEYS = ("img_path", "ori_shape", "img_shape", "scale_factor", "video_id", "frame_id")
DET_KEYS = (*SEG_KEYS, "img_id", "instances", "segments_info", "seg_map_path")


def run(tmp_path, scope, model, dataset, loading, metrics):
    """The metrics of Runner.test, as a config has them."""
    tiny.enter(scope)
    pack = {"type": "PackSegInputs", "meta_keys": SEG_KEYS}
    if scope == "mmdet":
        pack = {"type": "PackDetInputs", "meta_keys": DET_KEYS}
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (96, 64), "keep_ratio": False},
        *loading,
        pack,
    ]
    loader = {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**dataset, "pipeline": pipeline, "test_mode": True},
    }
    runner = Runner(
        model=ConfigDict(model) if isinstance(model, dict) else model,
        work_dir=str(tmp_path / "work"),
        test_dataloader=loader,
        test_cfg={},
        test_evaluator=metrics,
        default_scope=scope,
        experiment_name=tmp_path.name,
        log_level="ERROR",
    )
    return runner.test()


def test_in_the_runner_of_mmsegmentation_a_perfect_model_scores_100_and_a_random_one_what_upstream_says(tmp_path):
    root = miniatures.camvid(tmp_path / "camvid")
    data, loading = {"type": "CamVidStream", "data_root": str(root)}, [{"type": "LoadAnnotations"}]
    scores = run(tmp_path, "mmseg", Oracle(), data, loading, [{"type": "StreamIoUMetric"}])
    assert scores["stream/mIoU"] == scores["stream/mIoU_frames"] == scores["stream/mIoU_videos"] == 100
    assert scores["stream/one_a/mIoU"] == scores["stream/two_b/mIoU"] == 100
    model = tiny.fcn()
    for head in ("decode_head", "auxiliary_head"):
        model[head]["num_classes"] = 11
    scores = run(tmp_path, "mmseg", model, data, loading, [{"type": "StreamIoUMetric"}, {"type": "IoUMetric"}])
    assert scores["stream/mIoU"] == pytest.approx(scores["mIoU"], abs=0.00501)
    assert scores["stream/aAcc"] == pytest.approx(scores["aAcc"], abs=0.00501)


def test_in_the_runner_kitti_step_scores_semantic_streams(tmp_path):
    root = miniatures.kitti_step(tmp_path / "kitti")
    data = {"type": "KittiStep", "data_root": str(root), "split": "val"}
    loading = [{"type": "LoadKittiStepAnnotations"}]
    scores = run(tmp_path, "mmseg", Oracle(), data, loading, [{"type": "StreamIoUMetric"}])
    assert scores["stream/mIoU_frames"] == 100
    assert {key.split("/")[1] for key in scores if key.count("/") == 2} == {"0002", "0006"}


def test_in_the_runner_kitti_step_scores_panoptic_streams(tmp_path):
    root = miniatures.kitti_step(tmp_path / "kitti")
    data = {"type": "KittiStep", "data_root": str(root), "task": "panoptic"}
    loading = [{"type": "LoadKittiStepAnnotations"}]
    metrics = [{"type": "StreamPQMetric"}, {"type": "StreamAPMetric"}]
    scores = run(tmp_path, "mmdet", Oracle(classes=19, things=2), data, loading, metrics)
    assert scores["stream/PQ"] == scores["stream/PQ_th"] == scores["stream/PQ_st"] == 100
    assert scores["stream/segm_mAP"] == scores["stream/segm_mAP_frames"] == 100


@real_coco
def test_in_the_runner_real_coco_streams_through_mmdetections_own_data_sets(tmp_path):
    common = {"data_root": str(DATA / "coco100"), "indices": 6}
    prefix = {"img": "images/", "seg": "panoptic/"}
    data = {"type": "CocoPanopticDataset", "ann_file": "panoptic.json", "data_prefix": prefix, **common}
    metrics = [{"type": "StreamPQMetric"}, {"type": "StreamAPMetric", "metric": ["segm", "bbox"]}]
    scores = run(tmp_path, "mmdet", Oracle(), data, [{"type": "LoadPanopticSegments"}], metrics)
    assert scores["stream/PQ"] == scores["stream/PQ_frames"] == scores["stream/segm_mAP_frames"] == 100
    data = {"type": "CocoDataset", "ann_file": "instances.json", "data_prefix": {"img": "images/"}, **common}
    loading = [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
    scores = run(tmp_path, "mmdet", Oracle(), data, loading, metrics[1:])
    assert scores["stream/segm_mAP"] == scores["stream/bbox_mAP"] == 100


def test_in_the_runner_of_mmdetection_a_perfect_model_scores_100_and_a_random_one_runs(tmp_path):
    root = miniatures.coco_videos(tmp_path / "coco")
    data = {"type": "CocoVideos", "data_root": str(root), "videos": ["bar"]}
    loading = [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}]
    metrics = [{"type": "StreamAPMetric", "metric": ["segm", "bbox"]}, {"type": "CocoMetric", "metric": "segm"}]
    scores = run(tmp_path, "mmdet", Oracle(), data, loading, metrics)
    assert scores["stream/segm_mAP"] == scores["stream/segm_mAP_frames"] == scores["stream/bbox_mAP"] == 100
    assert scores["coco/segm_mAP"] == 1
    panoptic, loading = {**data, "task": "panoptic"}, [{"type": "LoadPanopticSegments"}]
    metrics = [{"type": "StreamPQMetric"}, {"type": "StreamAPMetric"}]
    scores = run(tmp_path, "mmdet", Oracle(), panoptic, loading, metrics)
    assert scores["stream/PQ"] == scores["stream/PQ_frames"] == scores["stream/PQ_th"] == 100
    assert scores["stream/segm_mAP"] == 100
    model = tiny.mask2former(things=80, stuff=53)
    scores = run(tmp_path, "mmdet", model, panoptic, loading, metrics)
    assert 0 <= scores["stream/PQ"] < 50
    assert 0 <= scores["stream/segm_mAP"] < 50


def test_mask2former_trains_on_panoptic_kitti_step_and_coco(tmp_path):
    """The class map, boxes and masks are what mmdetection's panoptic loss takes."""
    tiny.enter("mmdet")
    pack = [{"type": "LoadImageFromFile"}, {"type": "LoadPanopticSegments"}, {"type": "PackDetInputs"}]
    step = [pack[0], {"type": "LoadKittiStepAnnotations"}, pack[2]]
    kitti = {"type": "KittiStep", "data_root": str(miniatures.kitti_step(tmp_path / "a")), "task": "panoptic"}
    coco = {
        "type": "CocoPanopticDataset",
        "data_root": str(miniatures.coco(tmp_path / "b")),
        "ann_file": "panoptic.json",
        "data_prefix": {"img": "images/", "seg": "panoptic/"},
    }
    for dataset, pipeline, things, stuff in ((kitti, step, 2, 17), (coco, pack, 80, 53)):
        built = DATASETS.build({**dataset, "pipeline": pipeline})
        model = tiny.build(tiny.mask2former(things=things, stuff=stuff)).train()
        batch = model.data_preprocessor({k: [built[i][k] for i in range(2)] for k in ("inputs", "data_samples")}, True)
        losses = model.loss(batch["inputs"], batch["data_samples"])
        assert all(torch.isfinite(value).all() for value in losses.values())


# Over ranks


def rank_scores(rank, folder, world):
    """Each rank has one whole video; they differ in length."""
    os.chdir(folder)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    samples = list(mixed_samples(Path(folder) / f"labels{rank}"))
    mine = [sample for sample in samples if world == 1 or sample.metainfo["video_id"] == "vw"[rank]]
    evaluators = (
        (StreamIoUMetric(prefix="iou"), {"classes": NAMES}),
        (StreamAPMetric(prefix="ap"), PANOPTIC),
        (StreamPQMetric(prefix="pq"), PANOPTIC),
    )
    scores = {}
    for metric, meta in evaluators:
        evaluator = Evaluator(metric)
        evaluator.dataset_meta = meta
        for sample in mine:
            evaluator.process([sample])
        scores |= evaluator.evaluate(len(samples))
    torch.save(scores, Path(folder) / f"{world}_{rank}.pt")


def mixed_samples(folder):
    for seed, video in enumerate("vvvw"):
        file, segments, ids = panoptic_truth(folder, seed)
        sample = pan_sample(video, seed, file, segments, guessed(segments, ids, seed))
        _, detections = crowded(seed, classes=2)
        found = det_sample(video, seed, None, detections)
        sample.pred_instances = found.pred_instances
        prediction, truth = scene(seed)
        sample.pred_sem_seg = PixelData(data=torch.as_tensor(prediction)[None])
        sample.gt_sem_seg = PixelData(data=torch.as_tensor(truth)[None])
        yield sample


def test_two_ranks_give_exactly_the_scores_of_one(tmp_path):
    where = Path.cwd()
    try:
        rank_scores(0, str(tmp_path), 1)
    finally:
        os.chdir(where)
    mp.start_processes(rank_scores, args=(str(tmp_path), 2), nprocs=2, start_method="fork")
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("1_0", "2_0", "2_1"))
    assert {"iou/mIoU_frames", "iou/mIoU_present_videos", "ap/segm_mAP_videos", "pq/v/PQ"} <= one.keys()
    for scores in two:
        assert scores == pytest.approx(one, abs=0, rel=0, nan_ok=True)
