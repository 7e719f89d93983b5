"""mmcv's operators on boxes: non-maximum suppression, soft or hard, its groups, and overlaps.

Boxes are (x1, y1, x2, y2). With `offset` = 1 the last pixel belongs to a box: its width is x2 - x1 + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import ops

from ttt_adapt_openmmlab.ops.formula import wide


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """The boxes that overlap no better box by more than a threshold.

    Args:
        boxes: [N, 4].
        scores: [N].
        iou_threshold: intersection over union, in [0, 1].
        offset: 0 or 1.

    Returns:
        int64 [K], best first.
    """
    boxes = wide(boxes)
    if offset:  # x2 + 1 in the place of x2 gives the widths, areas and intersections of an offset of 1
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    limit = torch.tensor(iou_threshold, dtype=boxes.dtype).item()  # mmcv compares in the precision of the boxes
    return ops.nms(boxes, wide(scores), limit)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017): a box that overlaps a better one loses score, and goes below `min_score`.

    Args:
        boxes: [N, 4], on the CPU, as all others.
        scores: [N].
        dets: [N, 5]; its first K rows become box and new score, best first.
        iou_threshold: of the methods "naive" and "linear".
        sigma: of the method "gaussian".
        min_score: a box with less after a step is dropped.
        method: 0 naive (weight 0), 1 linear (1 - overlap), 2 gaussian (exp(-overlap ** 2 / sigma)).
        offset: 0 or 1.

    Returns:
        int64 [K]: which box each row is. Equal scores come in mmcv's order.
    """
    boxes, scores = wide(boxes), wide(scores).clone()
    order = torch.arange(len(boxes))
    done, left = 0, len(boxes)
    while done < left:
        best = done + int(scores[done:left].argmax())
        for values in (order, scores):
            values[[done, best]] = values[[best, done]]
        rest = slice(done + 1, left)
        overlap = _overlaps(boxes[order[done]][None], boxes[order[rest]], offset)
        scores[rest] *= _decay(overlap, iou_threshold, sigma, method)
        done, left = done + 1, _drop(order, scores, rest, min_score)
    dets[:left] = torch.cat([boxes[order[:left]], scores[:left, None]], 1).to(dets.dtype)
    return order[:left]


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """The groups of NMS: each kept box, and behind it the boxes that it suppresses, by score.

    Args:
        dets: [N, 5], boxes and scores, on the CPU.
        iou_threshold: a box that overlaps by so much, or more, is suppressed.

    Returns:
        Indices, one list per group, the best group first.
    """
    boxes, left = wide(dets[:, :4]), dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while len(left):
        best, rest = left[:1], left[1:]
        suppressed = _overlaps(boxes[best], boxes[rest], 0) >= iou_threshold
        groups.append([int(best), *rest[suppressed].tolist()])
        left = rest[~suppressed]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill `ious` with the overlaps of boxes.

    Args:
        bboxes1: [M, 4].
        bboxes2: [N, 4].
        ious: [M, N], or [M] if `aligned`.
        mode: 0 for intersection over union, 1 for intersection over the first box.
        aligned: whether only boxes of the same index are compared.
        offset: 0 or 1.
    """
    first, second = wide(bboxes1), wide(bboxes2)
    if not aligned:
        first = first[:, None]
    ious.copy_(_overlaps(first, second, offset, of_first=mode == 1, least=offset))


def _overlaps(first: Tensor, second: Tensor, offset: int, of_first: bool = False, least: float | None = None) -> Tensor:
    """Intersection over union, or over the first box, of boxes [..., 4] that broadcast; `least` bounds the divisor."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low + offset).clamp(min=0).prod(-1)
    area, other = ((boxes[..., 2:] - boxes[..., :2] + offset).prod(-1) for boxes in (first, second))
    whole = (area if of_first else area + other - common).expand_as(common)
    return common / (whole if least is None else whole.clamp(min=least))


def _decay(overlap: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    """The factor of the score of a box that overlaps the best one by so much."""
    if method == 2:
        return torch.exp(-(overlap**2) / sigma)
    low = 1 - overlap if method == 1 else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, low, 1)


def _drop(order: Tensor, scores: Tensor, rest: slice, min_score: float) -> int:
    """Drop the boxes below `min_score`; the last ones take their places, as in mmcv.

    Returns:
        The number of boxes that are left, with those before `rest`.
    """
    low = scores[rest] < min_score
    left = rest.stop - int(low.sum())
    kept = left - rest.start
    places = rest.start + low[:kept].nonzero()[:, 0]
    movers = left + (~low[kept:]).nonzero()[:, 0].flip(0)
    for values in (order, scores):
        values[places] = values[movers]
    return left
