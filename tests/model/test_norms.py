import copy

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, same_bits
from ttt_adapt.model.norms import batch_statistics, blended_statistics, frozen_norms, norm_layers, updating_norms


def test_frozen_norms_use_running_statistics_and_give_flags_back_after_an_error():
    model = zoo.TinySeg().train()
    norms = norm_layers(model)
    assert [type(n).__name__ for n in norms] == ["BatchNorm2d"]
    x = torch.randn(2, 3, 16, 16)
    with left_as_it_was(model), torch.no_grad():
        with frozen_norms(norms):
            inside = model.backbone(x)
        model.backbone.eval()
        assert torch.equal(inside, model.backbone(x))
        model.backbone.train()
        with pytest.raises(KeyError), frozen_norms(norms):
            raise KeyError


@pytest.mark.parametrize(
    ("norm", "lone", "several"),
    [
        (nn.BatchNorm1d(4), (1, 4), (2, 4)),
        (nn.BatchNorm1d(4), (1, 4, 1), (1, 4, 2)),
        (nn.BatchNorm2d(4, affine=False), (1, 4, 1, 1), (2, 4, 1, 1)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (3, 4, 1, 1), (3, 4, 1, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (4, 1), (4, 3)),
    ],
)
def test_one_value_per_channel_meets_the_running_statistics_and_does_not_enter_them(norm, lone, several):
    norm = copy.deepcopy(norm).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    lone, several = torch.randn(lone), torch.randn(several)
    plain, trained = norm(lone), copy.deepcopy(norm).train()
    trained.momentum = 0.5
    with left_as_it_was(norm):
        with batch_statistics([norm]):
            assert torch.equal(norm(lone), plain)
            assert torch.equal(norm(several), copy.deepcopy(trained)(several))  # and the next call has its own again
        with updating_norms([norm], 0.5):
            assert torch.equal(norm(lone), plain)
        with pytest.raises((RuntimeError, ValueError)), batch_statistics([norm]):
            norm(torch.randn(2, 2, 2, 2, 2))
    with updating_norms([norm], 0.5):
        norm(several)
    trained(several)
    assert same_bits(dict(norm.named_buffers()), dict(trained.named_buffers()))


def random_statistics(norm: nn.Module) -> nn.Module:
    norm = copy.deepcopy(norm).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm2d(4), (2, 4, 3, 5)),
        (nn.BatchNorm2d(4, affine=False), (1, 4, 3, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (1, 4, 3, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (4, 3, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_blend_is_the_formula_and_changes_no_running_statistics(norm, shape, share):
    norm = random_statistics(norm).double()
    x = torch.randn(shape, dtype=torch.float64)
    plain = norm(x)
    values = (x if x.ndim == 3 else x.transpose(0, 1)).flatten(1)  # [C, values]; of one image [C, H, W] as it is
    mean = (1 - share) * norm.running_mean + share * values.mean(1)
    variance = (1 - share) * norm.running_var + share * values.var(1)
    column = (-1,) if x.ndim == 2 else (-1, 1, 1)
    expected = (x - mean.view(column)) / (variance.view(column) + norm.eps).sqrt()
    with left_as_it_was(norm), blended_statistics([norm], share):
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
        assert share or torch.equal(norm(x), plain)


def test_a_blend_meets_one_value_per_channel_with_running_statistics_and_survives_an_error():
    norm = random_statistics(nn.BatchNorm2d(4))
    lone = torch.randn(1, 4, 1, 1)
    plain = norm(lone)
    with left_as_it_was(norm):
        with blended_statistics([norm], 0.5):
            assert torch.equal(norm(lone), plain)
        with pytest.raises((RuntimeError, ValueError)), blended_statistics([norm], 0.5):
            norm(torch.randn(2, 3, 5, 5))  # three channels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_taken_in_single(dtype):
    norm = random_statistics(nn.BatchNorm2d(4))
    x = (300 * torch.randn(1, 4, 16, 16)).to(dtype)
    with torch.no_grad(), blended_statistics([norm], 0.5):
        expected, found = norm(x.float()), norm(x)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_blend_does_not_depend_on_how_the_layer_is_called():
    norm = random_statistics(nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad(), left_as_it_was(norm), blended_statistics([norm], 0.5):
        found = norm(x)
        assert torch.equal(norm(input=x), found)
        assert torch.equal(copy.deepcopy(norm)(x), found)
        assert torch.equal(norm.train()(x), found)
        norm.eval()


def test_a_gradient_takes_blended_statistics_for_constants():
    norm = random_statistics(nn.BatchNorm2d(4)).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with blended_statistics([norm], 0.5):
        norm(x).sum().backward()
    variance = 0.5 * norm.running_var + 0.5 * x.detach().var((0, 2, 3))
    expected = norm.weight / (variance + norm.eps).sqrt()
    torch.testing.assert_close(x.grad, expected[:, None, None].expand_as(x))
