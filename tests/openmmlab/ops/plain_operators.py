"""mmcv's compiled operators once more, as plain loops over elements in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def overlap(a: Tensor, b: Tensor, offset: int) -> float:
    """Intersection over union of two boxes whose sides are x2 - x1 + offset."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    common = max(float(width), 0.0) * max(float(height), 0.0)
    areas = [float((box[2] - box[0] + offset) * (box[3] - box[1] + offset)) for box in (a, b)]
    return common / (sum(areas) - common)


def nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(boxes, scores, threshold, sigma, least, method, offset) -> tuple[list[int], list[float]]:
    """Lists whose head is the best box; what falls below `least` gives its place to the last one."""
    left = [[i, float(score)] for i, score in enumerate(scores)]
    at = 0
    while at < len(left):
        best = max(range(at, len(left)), key=lambda k: (left[k][1], -k))
        left[at], left[best] = left[best], left[at]
        place = at + 1
        while place < len(left):
            iou = overlap(boxes[left[at][0]], boxes[left[place][0]], offset)
            if method == "gaussian":
                factor = math.exp(-iou * iou / sigma)
            else:
                factor = 1.0 if iou < threshold else (1 - iou if method == "linear" else 0.0)
            left[place][1] *= factor
            if left[place][1] < least:
                last = left.pop()
                if place < len(left):
                    left[place] = last
            else:
                place += 1
        at += 1
    return [i for i, _ in left], [score for _, score in left]


def bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """A sample between pixels; more than one pixel outside it is 0, and up to one pixel outside that of the border."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return plane.sum() * 0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    down, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * plane[top, left] + u * plane[top, right]
    return (1 - v) * upper + v * ((1 - u) * plane[down, left] + u * plane[down, right])


def roi_align(x: Tensor, rois: Tensor, size, scale: float, ratio: int, mode: str, aligned: bool, moves=None) -> Tensor:
    """RoIAlign; with `moves` [N, 2, h, w], each cell is moved by so many widths and heights of its region."""
    cells = []
    for n, (image, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (value * scale - 0.5 * aligned for value in box)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        steps = height / size[0], width / size[1]
        counts = [ratio or math.ceil(step) for step in steps]
        for plane in x[int(image)]:
            for i in range(size[0]):
                for j in range(size[1]):
                    move = (0.0, 0.0) if moves is None else moves[n, :, i, j].tolist()
                    samples = [
                        bilinear(
                            plane,
                            top + (i + (a + 0.5) / counts[0]) * steps[0] + move[1] * height,
                            left + (j + (b + 0.5) / counts[1]) * steps[1] + move[0] * width,
                        )
                        for a in range(counts[0])
                        for b in range(counts[1])
                    ]
                    stacked = torch.stack(samples)
                    cells.append(stacked.max() if mode == "max" else stacked.mean())
    return torch.stack(cells).view(len(rois), x.shape[1], *size)


def roi_pool(x: Tensor, rois: Tensor, size, scale: float) -> Tensor:
    height, width = x.shape[-2:]
    cells = []
    for image, *box in rois.tolist():
        left, top, right, bottom = box[0] * scale, box[1] * scale, (box[2] + 1) * scale, (box[3] + 1) * scale
        steps = (bottom - top) / size[0], (right - left) / size[1]
        for plane in x[int(image)]:
            for i in range(size[0]):
                for j in range(size[1]):
                    rows = [max(math.floor(i * steps[0] + top), 0), min(math.ceil((i + 1) * steps[0] + top), height)]
                    cols = [max(math.floor(j * steps[1] + left), 0), min(math.ceil((j + 1) * steps[1] + left), width)]
                    cell = plane[rows[0] : max(rows[1], rows[0]), cols[0] : max(cols[1], cols[0])]
                    cells.append(cell.max() if cell.numel() else plane.sum() * 0)
    return torch.stack(cells).view(len(rois), x.shape[1], *size)


def deform_conv(x, offset, weight, mask=None, bias=None, *, stride, padding, dilation, groups, deform_groups) -> Tensor:
    """Each output is a sum over the kernel of the weight times a sample at its place, moved by (dy, dx)."""
    batch, channels, height, width = x.shape
    out, per_group, kh, kw = weight.shape
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    result = []
    for b in range(batch):
        for d in range(out):
            for i in range(rows):
                for j in range(columns):
                    total = x.sum() * 0 if bias is None else bias[d]
                    for c in range(per_group):
                        channel = d // (out // groups) * per_group + c
                        field = channel // (channels // deform_groups)
                        for k in range(kh * kw):
                            at = (field * kh * kw + k) * 2
                            y = i * stride[0] - padding[0] + k // kw * dilation[0] + float(offset[b, at, i, j])
                            z = j * stride[1] - padding[1] + k % kw * dilation[1] + float(offset[b, at + 1, i, j])
                            value = _zero_padded(x[b, channel], y, z)
                            if mask is not None:
                                value = value * mask[b, field * kh * kw + k, i, j]
                            total = total + weight[d, c, k // kw, k % kw] * value
                    result.append(total)
    return torch.stack(result).view(batch, out, rows, columns)


def _zero_padded(plane: Tensor, y: float, x: float) -> Tensor:
    """A sample between pixels, where everything outside is 0."""
    total = plane.sum() * 0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    half, cells = kernel // 2, []
    for b in range(batch):
        for c in range(channels):
            group = c // (channels // groups)
            for y in range(height * scale):
                for x in range(width * scale):
                    total = features.sum() * 0
                    for k in range(kernel**2):
                        row, column = y // scale + k // kernel - half, x // scale + k % kernel - half
                        if 0 <= row < height and 0 <= column < width:
                            total = total + features[b, c, row, column] * masks[b, group * kernel**2 + k, y, x]
                    cells.append(total)
    return torch.stack(cells).view(batch, channels, height * scale, width * scale)


def psa_mask(masks: Tensor, kind: str, size: tuple[int, int]) -> Tensor:
    batch, _, height, width = masks.shape
    result = torch.zeros(batch, height * width, height, width, dtype=masks.dtype)
    for h in range(height):
        for w in range(width):
            for i in range(size[0]):
                for j in range(size[1]):
                    y, x = h + i - (size[0] - 1) // 2, w + j - (size[1] - 1) // 2
                    if 0 <= y < height and 0 <= x < width:
                        value = masks[:, i * size[1] + j, h, w]
                        if kind == "collect":
                            result[:, y * width + x, h, w] = value
                        else:
                            result[:, h * width + w, y, x] = value
    return result
