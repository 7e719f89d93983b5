"""The operators that stand in for mmcv's compiled ones: values and gradients against plain loops, in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import plain_operators as plain
import ttt_adapt_openmmlab  # noqa: F401

COMPILED = Path(importlib.util.find_spec("mmcv").origin).parent.glob("_ext*.so")
pytestmark = pytest.mark.skipif(any(COMPILED), reason="mmcv has its compiled operators here")

ROIS = torch.tensor([[0, 1.0, 2.0, 7.3, 6.1], [1, -3, -2, 30, 20], [1, 4, 4, 4.5, 6], [0, 9, 9, 12, 8.5]]).double()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


def agree(ours, theirs, *inputs: torch.Tensor) -> None:
    """The same values, and the same gradients of all inputs."""
    made, found = [], []
    for function, results in ((ours, made), (theirs, found)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = function(*leaves)
        results += [output, *torch.autograd.grad((output * normal(*output.shape, seed=9)).sum(), leaves)]
    for one, other in zip(made, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def some_boxes(count: int, whole: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores; with whole numbers, many are equal."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 12
    boxes[:, 2:] = boxes[:, :2] + 1 + boxes[:, 2:] / 2
    scores = torch.rand(count, generator=generator)
    return (boxes.round(), (scores * 8).round() / 8) if whole else (boxes, scores)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms_keeps_the_boxes_that_overlap_no_better_one(threshold, offset):
    from mmcv.ops import nms

    boxes, scores = some_boxes(60, whole=False)
    kept, indices = nms(boxes, scores, threshold, offset)
    expected = plain.nms(boxes, scores, threshold, offset)
    assert indices.tolist() == expected
    assert torch.equal(kept, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_limits_number_and_score_and_takes_no_boxes_and_arrays():
    from mmcv.ops import nms

    boxes, scores = some_boxes(40, whole=False)
    expected = [i for i in plain.nms(boxes, scores, 0.5, 0) if scores[i] > 0.3]
    assert nms(boxes, scores, 0.5, score_threshold=0.3)[1].tolist() == expected
    assert nms(boxes.numpy(), scores.numpy(), 0.5, score_threshold=0.3, max_num=3)[1].tolist() == expected[:3]
    assert nms(boxes[:0], scores[:0], 0.5)[1].shape == (0,)


def test_the_threshold_of_nms_is_compared_in_the_precision_of_the_boxes():
    from mmcv.ops import nms

    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3]]), torch.tensor([0.9, 0.8])  # overlap by 0.3 exactly
    assert nms(boxes, scores, 0.3)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.29)[1].tolist() == [0]


def test_batched_nms_compares_boxes_of_one_class_only():
    from mmcv.ops import batched_nms

    boxes, scores = some_boxes(40, whole=False)
    classes = torch.arange(40) % 3
    expected = [
        i for k in range(3) for i in (_of(classes, k)[plain.nms(boxes[classes == k], scores[classes == k], 0.4, 0)])
    ]
    for split in (10000, 5):
        _, kept = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.4, "split_thr": split})
        assert sorted(kept.tolist()) == sorted(int(i) for i in expected)
    kept = batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.4}, class_agnostic=True)[1]
    assert kept.tolist() == plain.nms(boxes, scores, 0.4, 0)


def _of(classes: torch.Tensor, number: int) -> torch.Tensor:
    return (classes == number).nonzero()[:, 0]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("least", [1e-3, 0.2])
def test_soft_nms_lowers_scores_and_drops_boxes_in_the_order_of_mmcv(method, offset, whole, least):
    from mmcv.ops import soft_nms

    boxes, scores = some_boxes(50, whole)
    before = boxes.clone(), scores.clone()
    found, indices = soft_nms(boxes, scores, 0.3, 0.5, least, method, offset)
    expected, values = plain.soft_nms(boxes.double(), scores.double(), 0.3, 0.5, least, method, offset)
    assert indices.tolist() == expected
    assert torch.equal(found[:, :4], boxes[expected])
    torch.testing.assert_close(found[:, 4], torch.tensor(values), rtol=1e-5, atol=1e-6)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_soft_nms_takes_no_boxes():
    from mmcv.ops import soft_nms

    found, indices = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert (found.shape, indices.shape) == ((0, 5), (0,))


def test_groups_of_nms_hold_each_box_once_behind_the_box_that_suppresses_it():
    from mmcv.ops import nms_match

    boxes, scores = some_boxes(40, whole=False)
    groups = [group.tolist() for group in nms_match(torch.cat([boxes, scores[:, None]], 1), 0.4)]
    assert [group[0] for group in groups] == plain.nms(boxes, scores, 0.4, 0)
    assert sorted(i for group in groups for i in group) == list(range(40))
    for number, (head, *others) in enumerate(groups):
        for i in others:
            assert plain.overlap(boxes[head], boxes[i], 0) >= 0.4
            assert all(plain.overlap(boxes[group[0]], boxes[i], 0) < 0.4 for group in groups[:number])
        assert scores[others].tolist() == sorted(scores[others].tolist(), reverse=True)


@pytest.mark.parametrize("offset", [0, 1])
def test_overlaps_of_boxes_are_those_of_the_formula(offset):
    from mmcv.ops import bbox_overlaps

    first, second = some_boxes(6, whole=False)[0], some_boxes(6, whole=False, seed=1)[0]
    expected = torch.tensor([[plain.overlap(a, b, offset) for b in second] for a in first])
    torch.testing.assert_close(bbox_overlaps(first, second, offset=offset), expected)
    torch.testing.assert_close(bbox_overlaps(first, second, aligned=True, offset=offset), expected.diag())
    inside = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    assert bbox_overlaps(inside, torch.tensor([[0.0, 0.0, 2.0, 9.0]]), mode="iof").item() == 0.5


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_takes_mean_or_maximum_of_its_samples(mode, ratio, aligned):
    from mmcv.ops import roi_align

    settings = (3, 2), 0.5, ratio, mode, aligned
    rois = ROIS[:3]
    agree(lambda x: roi_align(x, rois, *settings), lambda x: plain.roi_align(x, rois, *settings), normal(2, 3, 9, 11))


def test_roi_align_of_a_region_without_area_is_that_of_mmcv():
    from mmcv.ops import roi_align

    x = normal(1, 2, 5, 5)
    empty = torch.tensor([[0.0, 2, 2, 2, 2]]).double()
    assert torch.equal(roi_align(x, empty, (2, 2), 1.0, 0, "avg", True), torch.zeros(1, 2, 2, 2).double())
    lowest = roi_align(x, empty, (2, 2), 1.0, 0, "max", True)
    assert torch.equal(lowest, torch.full_like(lowest, torch.finfo(torch.float32).min))
    assert roi_align(x, empty[:0], (2, 2), 1.0, 0, "avg", True).shape == (0, 2, 2, 2)


@pytest.mark.parametrize("ratio", [0, 2])
def test_deformable_pooling_moves_each_cell_by_its_offset(ratio):
    from mmcv.ops import deform_roi_pool

    x, offset, rois = normal(2, 3, 9, 11), normal(3, 2, 3, 2, seed=1), ROIS[:3]
    expected = plain.roi_align(x, rois, (3, 2), 0.5, ratio, "avg", True, 0.2 * offset)
    torch.testing.assert_close(deform_roi_pool(x, rois, offset, (3, 2), 0.5, ratio, 0.2), expected)
    inputs = x.requires_grad_(), offset.requires_grad_()
    pool = lambda x, o: deform_roi_pool(x, rois, o, (3, 2), 0.5, ratio, 0.2)  # noqa: E731
    assert torch.autograd.gradcheck(pool, inputs, fast_mode=True)
    still = lambda x: deform_roi_pool(x, rois, None, (3, 2), 0.5, ratio)  # noqa: E731
    agree(still, lambda x: plain.roi_align(x, rois, (3, 2), 0.5, ratio, "avg", True), x.detach())


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_roi_pool_takes_the_maximum_of_the_pixels_that_a_cell_touches(scale):
    from mmcv.ops import roi_pool

    x = normal(2, 3, 9, 11)
    rois = torch.cat([ROIS, torch.tensor([[0, 40.0, 40, 44, 50]]).double()])  # the last one is outside
    rois = rois[rois[:, 4] > rois[:, 2]]
    agree(lambda x: roi_pool(x, rois, (3, 2), scale), lambda x: plain.roi_pool(x, rois, (3, 2), scale), x)


CONVOLUTIONS = [
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "deform_groups": 1},
    {"stride": (2, 1), "padding": (2, 0), "dilation": (1, 2), "groups": 2, "deform_groups": 2},
]


def convolution_inputs(settings: dict) -> list[torch.Tensor]:
    """Input, offset, weight, mask and bias of a 3 x 2 kernel."""
    size, padding, dilation = (5, 6), settings["padding"], settings["dilation"]
    rows, columns = (
        (size[i] + 2 * padding[i] - dilation[i] * (k - 1) - 1) // settings["stride"][i] + 1
        for i, k in enumerate((3, 2))
    )
    fields = settings["deform_groups"] * 6
    shapes = [(1, 4, *size), (1, 2 * fields, rows, columns), (4, 4 // settings["groups"], 3, 2)]
    made = [normal(*shape, seed=i) for i, shape in enumerate([*shapes, (1, fields, rows, columns), (4,)])]
    return [made[0], 2 * made[1], made[2], made[3].sigmoid(), made[4]]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_deformable_convolution_reads_its_offsets_as_mmcv_does(settings):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    x, offset, weight, mask, bias = convolution_inputs(settings)
    values = list(settings.values())
    torch.testing.assert_close(
        deform_conv2d(x, offset, weight, *values), plain.deform_conv(x, offset, weight, **settings)
    )
    made = modulated_deform_conv2d(x, offset, mask, weight, bias, *values)
    torch.testing.assert_close(made, plain.deform_conv(x, offset, weight, mask, bias, **settings))


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_deformable_convolution_has_the_gradients_of_its_formula(settings):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    x, offset, weight, mask, bias = (tensor.requires_grad_() for tensor in convolution_inputs(settings))
    values = list(settings.values())
    assert torch.autograd.gradcheck(lambda *inputs: deform_conv2d(*inputs, *values), (x, offset, weight))
    inputs = (x, offset, mask, weight, bias)
    assert torch.autograd.gradcheck(lambda *inputs: modulated_deform_conv2d(*inputs, *values), inputs)
    assert torch.autograd.gradcheck(lambda *inputs: modulated_deform_conv2d(*inputs, None, *values), inputs[:4])
    weights_only = lambda weight: deform_conv2d(x.detach(), offset.detach(), weight, *values)  # noqa: E731
    assert torch.autograd.gradcheck(weights_only, (weight,))


def test_modulated_convolution_takes_the_first_numbers_of_larger_fields_as_mmcv_does():
    from mmcv.ops import modulated_deform_conv2d

    settings = CONVOLUTIONS[1]
    x, offset, weight, mask, bias = convolution_inputs(settings)
    x, offset, mask = (torch.cat([tensor, tensor.flip(1)]) for tensor in (x, offset, mask))  # two images
    larger = [F.pad(fields.flatten(1), (0, 5 * fields.shape[1])) for fields in (offset, mask)]
    shapes = [(2, fields.shape[1], fields[0, 0].numel() + 5, 1) for fields in (offset, mask)]
    larger = [fields.view(shape).requires_grad_() for fields, shape in zip(larger, shapes, strict=True)]
    made = modulated_deform_conv2d(x, *larger, weight, bias, *settings.values())
    torch.testing.assert_close(made, plain.deform_conv(x, offset, weight, mask, bias, **settings))
    found = torch.autograd.grad(made.square().sum(), larger)
    inputs = offset.requires_grad_(), mask.requires_grad_()
    made = modulated_deform_conv2d(x, *inputs, weight, bias, *settings.values())
    for large, small in zip(found, torch.autograd.grad(made.square().sum(), inputs), strict=True):
        torch.testing.assert_close(large.flatten(1), F.pad(small.flatten(1), (0, 5 * small.shape[1])))


def test_modulated_convolution_of_no_images_reads_its_fields_by_their_shapes():
    from ttt_adapt_openmmlab.ops.deformable_conv import modulated_deform_conv_forward

    x, weight = torch.zeros(0, 4, 8, 8), torch.zeros(4, 4, 3, 3)
    geometry = {f"{name}_{axis}": 1 for name in ("stride", "pad", "dilation") for axis in "hw"}
    for side in (8, 9):
        offset, mask, out = torch.zeros(0, 18, side, side), torch.zeros(0, 9, side, side), torch.ones(0, 4, 8, 8)
        given = x, weight, torch.zeros(4), torch.zeros(0), offset, mask, out, torch.zeros(0)
        modulated_deform_conv_forward(*given, **geometry, group=1, deformable_group=1, with_bias=False)
        assert out.shape == (0, 4, 8, 8)


def test_the_gradient_of_a_deformable_convolution_can_be_taken_twice():
    from mmcv.ops import deform_conv2d

    x, offset, weight = (tensor.requires_grad_() for tensor in convolution_inputs(CONVOLUTIONS[0])[:3])
    total = deform_conv2d(x, offset, weight, *CONVOLUTIONS[0].values()).sum()
    first = torch.autograd.grad(total, weight, retain_graph=True)
    assert torch.equal(torch.autograd.grad(total, weight)[0], first[0])


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_of_sigmoids_is_that_of_the_formula(gamma, weighted):
    from mmcv.ops import sigmoid_focal_loss

    target = torch.tensor([0, 1, 2, 0, 1]) if weighted else torch.tensor([0, 3, 2, 3, 1])  # 3 is background
    weight = torch.tensor([0.5, 1.0, 2.0]).double() if weighted else None
    one_hot = F.one_hot(target, 4)[:, :3].double()

    def formula(x):
        p = x.sigmoid()
        loss = -one_hot * 0.3 * (1 - p) ** gamma * p.log() - (1 - one_hot) * 0.7 * p**gamma * (1 - p).log()
        return loss if weight is None else loss * weight[target][:, None]

    agree(lambda x: sigmoid_focal_loss(x, target, gamma, 0.3, weight, "none"), formula, 3 * normal(5, 3))
    agree(
        lambda x: sigmoid_focal_loss(x, target, gamma, 0.3, weight, "mean")[None],
        lambda x: formula(x).sum()[None] / 5,
        3 * normal(5, 3),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_of_a_softmax_is_that_of_the_formula_and_skips_rows_without_a_class(weighted):
    from mmcv.ops import softmax_focal_loss

    target = torch.tensor([0, -1, 2, 0, 1])
    weight = torch.tensor([0.5, 1.0, 2.0]).double()

    def formula(x):
        p = x.softmax(1)[range(5), target.clamp(min=0)]
        loss = -0.3 * (1 - p) ** 1.5 * p.log() * (weight[target] if weighted else 1)
        return (loss * (target >= 0)).sum()[None]

    given = weight if weighted else None
    agree(lambda x: softmax_focal_loss(x, target, 1.5, 0.3, given, "sum")[None], formula, 3 * normal(5, 3))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_of_a_focal_loss_is_0_where_the_model_is_sure_and_right(gamma, dtype):
    from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

    logits = torch.tensor([[200.0, -200.0, -200.0]], dtype=dtype).requires_grad_()
    for loss in (softmax_focal_loss, sigmoid_focal_loss):
        (slope,) = torch.autograd.grad(loss(logits, torch.tensor([0]), gamma, 0.25, None, "sum"), logits)
        assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weights_alone_of_a_deformable_convolution_may_have_a_gradient_in_16_bits(dtype):
    from mmcv.ops import deform_conv2d

    given, settings = [tensor.to(dtype) for tensor in convolution_inputs(CONVOLUTIONS[0])[:3]], CONVOLUTIONS[0].values()
    slopes = []
    for x, offset, weight in (given, [tensor.double() for tensor in given]):
        leaf = weight.clone().requires_grad_()
        slopes += torch.autograd.grad(deform_conv2d(x, offset, leaf, *settings).sum(), leaf)
    assert slopes[0].dtype == dtype
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 2), (3, 2, 1)])
def test_carafe_sums_a_weighted_window_around_each_pixel(kernel, groups, scale):
    from mmcv.ops import carafe

    features, masks = normal(2, 4, 3, 4), normal(2, groups * kernel**2, 3 * scale, 4 * scale, seed=1)
    settings = kernel, groups, scale
    agree(lambda *inputs: carafe(*inputs, *settings), lambda *inputs: plain.carafe(*inputs, *settings), features, masks)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
@pytest.mark.parametrize("size", [(5, 7), (3, 3)])
def test_masks_of_psanet_connect_each_pixel_with_its_window(kind, size):
    from mmcv.ops import PSAMask

    masks = normal(2, size[0] * size[1], 3, 4)
    agree(PSAMask(kind, size), lambda x: plain.psa_mask(x, kind, size), masks)


def test_a_masked_convolution_is_the_convolution_at_the_places_of_its_mask():
    from mmcv.ops import MaskedConv2d

    layer = MaskedConv2d(3, 4, 3, padding=1).double()
    x, mask = normal(1, 3, 5, 6), normal(1, 5, 6, seed=1) > 0
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(layer(x, mask), layer(x) * mask)
    assert torch.equal(layer(x, mask & False), torch.zeros(1, 4, 5, 6).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operators_take_numbers_of_16_bits_and_return_them(dtype):
    from mmcv.ops import modulated_deform_conv2d, nms, roi_align, sigmoid_focal_loss

    settings = list(CONVOLUTIONS[0].values())
    given = [tensor.to(dtype) for tensor in convolution_inputs(CONVOLUTIONS[0])]
    x, offset, weight, mask, bias = (tensor.clone().requires_grad_() for tensor in given)
    logits, target = normal(5, 3, dtype=dtype).requires_grad_(), torch.tensor([0, 3, 2, 3, 1])
    made = [
        modulated_deform_conv2d(x, offset, mask, weight, bias, *settings),
        roi_align(x, ROIS[:1].to(dtype), (2, 2), 0.5, 0, "avg", True),
        sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none"),
    ]
    wide = [tensor.double() for tensor in given]
    expected = [
        plain.deform_conv(wide[0], wide[1], wide[2], wide[3], wide[4], **CONVOLUTIONS[0]),
        plain.roi_align(wide[0], ROIS[:1].to(dtype).double(), (2, 2), 0.5, 0, "avg", True),
        sigmoid_focal_loss(logits.detach().double(), target, 2.0, 0.25, None, "none"),
    ]
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
    sum(tensor.sum() for tensor in made).backward()
    assert {tensor.grad.dtype for tensor in (x, offset, weight, mask, bias, logits)} == {dtype}
    boxes, scores = some_boxes(20, whole=True)
    assert nms(boxes.to(dtype), scores.to(dtype), 0.5)[1].tolist() == nms(boxes, scores, 0.5)[1].tolist()
