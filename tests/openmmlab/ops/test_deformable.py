"""Deformable attention without compiled operators, against the formula in float64 and against mmcv's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ttt_adapt_openmmlab  # noqa: F401  # before mmcv.ops, which may lack its operators
from attention_cases import PYRAMID, RAGGED, assert_close, exact, inputs
from ttt_adapt import TTTAdaptError
from ttt_adapt.errors import StateError
from ttt_adapt_openmmlab.ops import deformable, deformable_cpu
from ttt_adapt_openmmlab.ops.deformable import DeformableAttentionError, deformable_attention, instead_of

from mmcv.ops import multi_scale_deform_attn as mmcv_attention  # isort: skip

ROOT = Path(__file__).parents[3]


def leaves(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.requires_grad_() if t.is_floating_point() else t for t in arguments]


def gradients(arguments: list[torch.Tensor], grad: torch.Tensor, attention=deformable_attention):
    out = attention(*leaves(arguments))
    return out, torch.autograd.grad(out, [arguments[0], *arguments[2:]], grad.to(out.dtype))


# ---- the CPU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("levels", "dim"), [(PYRAMID, 8), (RAGGED, 5), ([(1, 1)], 1)])
def test_the_cpu_gives_the_formula_forward_and_backward(levels, dim, dtype):
    arguments = inputs(levels, dim, dtype)
    expected, grad, expected_grads = exact(arguments)
    out, grads = gradients(arguments, grad)
    assert out.dtype == dtype
    assert_close(out.detach(), expected, dtype)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, dtype)


def test_numeric_gradients_agree():
    arguments = leaves(inputs(PYRAMID[:2], 3, queries=2, points=1))
    shapes = arguments[1]
    attention = lambda value, locations, weights: deformable_attention(value, shapes, locations, weights)  # noqa: E731
    assert torch.autograd.gradcheck(attention, (arguments[0], *arguments[2:]))


@pytest.mark.parametrize("group", [1, 14, 21, 10**6])
def test_images_computed_together_or_one_by_one_give_the_same(monkeypatch, group):
    arguments = [torch.cat([t, t.flip(0), t]) if t.is_floating_point() else t for t in inputs(PYRAMID, 4)]
    expected, grad, expected_grads = exact(arguments)
    monkeypatch.setattr(deformable_cpu, "GROUP", group)
    out, grads = gradients(arguments, grad)
    assert_close(out.detach(), expected, torch.float64)
    for got, want in zip(grads, expected_grads, strict=True):
        assert_close(got, want, torch.float64)


def test_at_pixel_centres_and_on_borders_it_is_grid_sample():
    """There the formula has kinks, and mmcv's function, which calls grid_sample, says which side counts."""
    value, shapes, _, _ = inputs([(4, 8)], 3)
    steps = torch.arange(-2, 22, dtype=torch.float64) / 16
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(1, -1, 1, 1, 1, 2)
    locations = grid.repeat(2, 1, 2, 1, 1, 1)
    weights = torch.rand(locations.shape[:-1], dtype=torch.float64)
    arguments = [value, shapes, locations, weights]
    grad = torch.randn(2, locations.shape[1], 6, dtype=torch.float64)
    out, grads = gradients(arguments, grad)
    plain, plain_grads = gradients(arguments, grad, mmcv_attention.multi_scale_deformable_attn_pytorch.__wrapped__)
    torch.testing.assert_close((out, *grads), (plain, *plain_grads), rtol=1e-9, atol=1e-12)


def test_far_outside_counts_nothing_and_nan_comes_out():
    value, shapes, locations, weights = inputs(PYRAMID, 4)
    locations[:, 0], locations[:, 1], locations[:, 2, :, 0, 0, 0] = 1e30, float("-inf"), float("nan")
    out = deformable_attention(value, shapes, locations, weights)
    assert not out[:, :2].any()
    assert out[:, 2].isnan().all()
    assert out[:, 3:].isfinite().all()


def test_views_of_other_layouts_and_no_queries_are_taken():
    value, shapes, locations, weights = inputs(PYRAMID, 4)
    expected = deformable_attention(value, shapes, locations, weights)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (value, locations, weights)]
    assert torch.equal(deformable_attention(turned[0], shapes, *turned[1:]), expected)
    empty = [value, shapes, locations[:, :0], weights[:, :0]]
    out, grads = gradients(empty, torch.zeros(2, 0, 8))
    assert out.shape == (2, 0, 8)
    assert not grads[0].any()


def test_under_autocast_mixed_dtypes_are_summed_in_float32():
    value, shapes, locations, weights = inputs(PYRAMID, 8, torch.float32)
    arguments = [value.bfloat16(), shapes, locations, weights]
    expected, grad, expected_grads = exact(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(arguments, grad)
    assert out.dtype == torch.bfloat16
    assert_close(out.detach(), expected, torch.bfloat16)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert_close(grads[0], expected_grads[0], torch.bfloat16)
    for got, want in zip(grads[1:], expected_grads[1:], strict=True):
        assert_close(got, want, torch.float32)


def test_a_second_derivative_is_refused():
    arguments = leaves(inputs(PYRAMID, 4))
    (first,) = torch.autograd.grad(deformable_attention(*arguments).sum(), arguments[0], create_graph=True)
    with pytest.raises(StateError, match="no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda v, s, x, w: (v[0], s, x, w), r"expected \[B, S, heads, dim\]"),
        (lambda v, s, x, w: (v, s, x[:, :, :, :2], w), r"expected \[2, Q, 2, 3, points, 2\]"),
        (lambda v, s, x, w: (v, s, x, w[..., :1]), "the same without the 2"),
        (lambda v, s, x, w: (v.long(), s, x, w), "expected floats and integers"),
        (lambda v, s, x, w: (v[:, 1:], s, x, w), "have 89 pixels.*have 88"),
    ],
)
def test_arguments_that_do_not_fit_are_named(wrong, words):
    with pytest.raises(DeformableAttentionError, match=words) as raised:
        deformable_attention(*wrong(*inputs(PYRAMID, 4)))
    assert isinstance(raised.value, TTTAdaptError)


def test_the_operator_keeps_the_rules_of_torch():
    torch.library.opcheck(
        torch.ops.ttt_adapt.deformable_attention.default, tuple(leaves(inputs(PYRAMID[:2], 4, torch.float32)))
    )


def test_it_compiles_into_one_graph_with_its_gradient():
    arguments = inputs(PYRAMID, 4, torch.float32)
    attention = instead_of(mmcv_attention.multi_scale_deformable_attn_pytorch)
    step = lambda *a: attention(*a).square().sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = leaves(arguments)
    wanted = [wanted[0], *wanted[2:]]
    got = torch.autograd.grad(compiled(*arguments), wanted)
    torch.testing.assert_close(got, torch.autograd.grad(step(*arguments), wanted))


# ---- in the place of mmcv's function


def test_the_module_of_mmcv_calls_it_and_gives_what_it_gave(monkeypatch):
    torch.manual_seed(0)
    module = mmcv_attention.MultiScaleDeformableAttention(24, num_heads=3, num_levels=3, batch_first=True, dropout=0.0)
    nn.init.normal_(module.sampling_offsets.weight)
    shapes = torch.tensor(PYRAMID)
    query, reference = torch.randn(2, 89, 24), torch.rand(2, 89, 3, 2)
    call = lambda: module(query, reference_points=reference, spatial_shapes=shapes)  # noqa: E731
    ours = mmcv_attention.multi_scale_deformable_attn_pytorch
    calls = []
    monkeypatch.setattr(deformable, "deformable_attention", lambda *a: calls.append(a) or deformable_attention(*a))
    got = call()
    assert len(calls) == 1
    monkeypatch.setattr(mmcv_attention, "multi_scale_deformable_attn_pytorch", ours.__wrapped__)
    torch.testing.assert_close(got, call(), rtol=1e-5, atol=1e-5)


def test_another_device_keeps_the_function_of_mmcv():
    attention = instead_of(lambda *a: "plain")
    assert attention(*(t.to("meta") for t in inputs(PYRAMID, 4))) == "plain"


def test_putting_it_there_again_changes_nothing():
    ours = mmcv_attention.multi_scale_deformable_attn_pytorch
    assert instead_of(ours) is ours


class OnCuda:
    """What a dispatch sees of a CUDA tensor."""

    is_cuda, device = True, torch.device("cuda")


@pytest.mark.parametrize("works", [True, False])
def test_on_cuda_triton_decides(monkeypatch, works):
    monkeypatch.setattr(deformable, "triton_works", lambda: works)
    monkeypatch.setattr(deformable, "deformable_attention", lambda *a: "kernel")
    assert instead_of(lambda *a: "plain")(OnCuda(), None, None, None) == ("kernel" if works else "plain")


def test_a_triton_that_cannot_run_is_told_once_and_left(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    deformable.try_triton.cache_clear()
    with pytest.warns(UserWarning, match="takes mmcv's path in plain PyTorch"):
        assert not deformable.triton_works()
    assert not deformable.triton_works()
    deformable.try_triton.cache_clear()


def test_without_triton_nothing_is_told(monkeypatch, recwarn):
    monkeypatch.setattr(deformable.importlib.util, "find_spec", lambda name: None)
    deformable.try_triton.cache_clear()
    assert not deformable.triton_works()
    assert not recwarn.list
    deformable.try_triton.cache_clear()


# ---- the kernels


@pytest.mark.slow
def test_the_kernels_give_the_formula_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "interpreted_kernels.py"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "16 passed" in done.stdout
    assert "skipped" not in done.stdout


TRANSLATE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ttt_adapt_openmmlab.ops import deformable_cuda as kernels
POINTERS = dict(shapes="*i64", scales="*fp32", grad_value="*fp32", tokens="i32", queries="i32")
for kernel, more in ((kernels.forward_kernel, {}), (kernels.backward_kernel, {"FIXED": False})):
    sizes = dict(HEADS=8, DIM=24, LEVELS=3, POINTS=4, ACC=tl.float32, BLOCK_Q=32, BLOCK_D=32) | more
    kinds = {n: "constexpr" if n in sizes else POINTERS.get(n, "*bf16") for n in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, kinds, sizes), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, "st.local" in made.asm["ptx"], len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_the_kernels_translate_for_an_h100_without_one():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", TRANSLATE], capture_output=True, text=True, cwd=ROOT, timeout=600)
    told = [line for line in done.stdout.splitlines() if "_kernel" in line]
    assert told == ["forward_kernel False True", "backward_kernel False True"], done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 24])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_gpu_gives_the_formula(dtype, dim, fixed):
    arguments = inputs(PYRAMID, dim, dtype, queries=100)
    expected, grad, expected_grads = exact(arguments)
    torch.use_deterministic_algorithms(fixed)
    try:
        out, grads = gradients([t.cuda() for t in arguments], grad.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(out.detach().cpu(), expected, dtype)
    for got, want in zip(grads, expected_grads, strict=True):
        assert_close(got.cpu(), want, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compiles_it_into_one_graph():
    arguments = [t.detach().cuda() for t in inputs(PYRAMID, 16, torch.float32)]
    attention = instead_of(mmcv_attention.multi_scale_deformable_attn_pytorch)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True)(*arguments), attention(*arguments))
