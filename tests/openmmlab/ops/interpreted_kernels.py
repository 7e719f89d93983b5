"""The Triton kernels in Triton's interpreter, on the CPU: `test_deformable.py` runs this file in a process of its own.

TRITON_INTERPRET=1 pytest tests/openmmlab/ops/interpreted_kernels.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from attention_cases import PYRAMID, RAGGED, assert_close, exact, formula, inputs

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
FILE = Path(__file__).parents[3] / "integrations/ttt_adapt_openmmlab/ops/deformable_cuda.py"
spec = importlib.util.spec_from_file_location("kernels", FILE)  # alone: the package around it imports OpenMMLab
kernels = importlib.util.module_from_spec(spec)
sys.modules["kernels"] = kernels
spec.loader.exec_module(kernels)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Check forward and backward against the formula in float64; the gradients."""
    expected, grad, expected_grads = exact(arguments)
    dtype = arguments[0].dtype
    assert_close(kernels.forward(*arguments), expected, dtype)
    grads = kernels.backward(grad, *arguments)
    for got, want, like in zip(grads, expected_grads, (arguments[0], *arguments[2:]), strict=True):
        assert got.dtype == like.dtype
        assert_close(got, want, dtype)
    return list(grads)


@pytest.mark.parametrize(("levels", "dim"), [(PYRAMID[1:], 8), (RAGGED, 12), (PYRAMID[:1], 1)])
def test_float64_is_the_formula_forward_and_backward(levels, dim):
    compare(inputs(levels, dim))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 24), (torch.float16, 16), (torch.bfloat16, 12)])
def test_every_dtype_is_the_formula_within_its_rounding(dtype, dim):
    compare(inputs(PYRAMID[:2], dim, dtype))


def test_the_dtypes_of_autocast_may_be_mixed():
    value, shapes, locations, weights = inputs(PYRAMID[:2], 8, torch.float32)
    compare([value.bfloat16(), shapes, locations, weights])


def test_queries_beyond_a_tile_are_computed_too(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 32)  # four queries at dim 8
    compare(inputs(PYRAMID[:2], 8, queries=9))


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_gradient_is_the_formula_and_the_same_in_any_order():
    arguments = inputs(PYRAMID[:1], 8, torch.float32, queries=12)
    compare(arguments)
    value, shapes, locations, weights = arguments
    grad = torch.randn(2, 12, 16)
    order = torch.randperm(12)
    first = kernels.backward(grad, *arguments)[0]
    other = kernels.backward(grad[:, order], value, shapes, locations[:, order], weights[:, order])[0]
    assert torch.equal(first, other)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("scale", [1e-30, 1e30, 0.0])
def test_a_deterministic_gradient_has_the_range_of_floats(scale):
    arguments = inputs(PYRAMID[:1], 8, torch.float32)
    grad = torch.randn(2, 7, 16)
    plain = kernels.backward(grad, *arguments)[0]
    scaled = kernels.backward(grad * scale, *arguments)[0]
    torch.testing.assert_close(scaled, plain * scale, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.usefixtures("deterministic")
def test_an_overflow_stays_visible_to_a_loss_scaler():
    arguments = inputs(PYRAMID[:1], 8, torch.float32)
    grad = torch.randn(2, 7, 16)
    grad[0, 3, 5] = float("inf")
    assert not kernels.backward(grad, *arguments)[0].isfinite().any()


def test_locations_far_outside_count_nothing_and_nan_comes_out():
    value, shapes, locations, weights = inputs(PYRAMID[:2], 8)
    locations[:, 0], locations[:, 1], locations[:, 2, :, 0, 0, 0] = 1e30, float("-inf"), float("nan")
    out = kernels.forward(value, shapes, locations, weights)
    assert not out[:, :2].any()
    assert out[:, 2].isnan().all()
    assert out[:, 3:].isfinite().all()
    grads = kernels.backward(torch.ones_like(out), value, shapes, locations, weights)
    assert not grads[1][:, :2].any()
    assert not grads[2][:, :2].any()


def test_levels_larger_than_the_values_read_nothing_beyond_them():
    value, shapes, locations, weights = inputs(PYRAMID[:2], 8)
    padded = torch.cat([value, value.new_zeros(2, 20, 2, 8)], 1)
    larger = shapes + torch.tensor([[0, 0], [4, 0]])
    got = kernels.forward(value, larger, locations, weights)
    assert_close(got, formula(padded, larger, locations, weights), torch.float64)


def test_no_queries_and_no_images_are_no_error():
    value, shapes, locations, weights = inputs(PYRAMID[:1], 8)
    assert kernels.forward(value, shapes, locations[:, :0], weights[:, :0]).shape == (2, 0, 16)
    grads = kernels.backward(value.new_zeros(2, 0, 16), value, shapes, locations[:, :0], weights[:, :0])
    assert not grads[0].any()
