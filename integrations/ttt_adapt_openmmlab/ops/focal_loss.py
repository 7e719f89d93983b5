"""mmcv's focal losses (Lin et al. 2017), of sigmoids and of a softmax, per element and without reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt_openmmlab.ops.formula import fill, gradients, wide


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` with the loss of each class.

    Args:
        input: logits [N, C].
        target: int64 [N]; the class of each row. Any other number, such as C, is background.
        weight: of each class, [C], for the rows of that class; or empty.
        output: [N, C].
        gamma: the exponent that lowers the loss of easy rows.
        alpha: the share of the class against the others, in [0, 1].
    """
    fill(output, lambda x: _sigmoid(x, target, weight, gamma, alpha), input)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` [N, C] with the derivative of each element; the arguments are those of the forward."""
    ones = torch.ones_like(input)
    grad_input.copy_(gradients(lambda x: _sigmoid(x, target, weight, gamma, alpha), [input], ones)[0])


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` with the loss of each row.

    Args:
        softmax: probabilities [N, C].
        target: int64 [N]; a row with a negative class has no loss.
        weight: of each class, [C], or empty.
        output: [N].
        gamma: the exponent that lowers the loss of easy rows.
        alpha: a factor of all rows.
    """
    p = wide(softmax).gather(1, target.clamp(min=0)[:, None])[:, 0]
    output.copy_(-alpha * (1 - p) ** gamma * _log(p) * _row_weight(p, target, weight))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` [N, C] with the derivative by the logits; the other arguments are those of the forward."""
    probabilities, label = wide(softmax), target.clamp(min=0)
    p = probabilities.gather(1, label[:, None])[:, 0]
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # at p = 1 a power below 0 is infinite, and the logarithm 0
    slope = alpha * (gamma * rest ** (gamma - 1) * p * _log(p) - rest**gamma) * _row_weight(p, target, weight)
    grad_input.copy_(-slope[:, None] * probabilities)
    grad_input.scatter_add_(1, label[:, None], slope[:, None].to(grad_input.dtype))


def _sigmoid(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = torch.arange(x.shape[1], device=x.device)
    hit = target[:, None] == classes
    right = torch.where(hit, x, -x)  # the logit of the right answer; powers by logarithms have a gradient at p = 1
    share = torch.full_like(x, 1 - alpha).masked_fill(hit, alpha)
    loss = -share * (gamma * F.logsigmoid(-right)).exp() * F.logsigmoid(right)
    if not weight.numel():
        return loss
    foreground = (target >= 0) & (target < len(weight))  # background has no weight of its own
    return loss * torch.where(foreground, weight.to(x)[target.clamp(0, len(weight) - 1)], 1)[:, None]


def _row_weight(p: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class [N]; 0 for a row without a class."""
    known = (target >= 0).to(p)
    return known * weight.to(p)[target.clamp(min=0)] if weight.numel() else known


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(torch.float32).tiny).log()
