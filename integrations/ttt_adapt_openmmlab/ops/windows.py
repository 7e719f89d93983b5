"""mmcv's operators that read a window around each place: CARAFE, masked convolution, and the masks of PSANet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_adapt_openmmlab.ops.formula import fill, gradients


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill `output` with CARAFE (Wang et al. 2019): each new pixel is a weighted sum of a window of the old ones.

    Args:
        features: [B, C, H, W].
        masks: the weights, [B, groups * k * k, s * H, s * W].
        rfeatures: [B, C, H, W]; gets the features, which the backward has no other argument for.
        routput: not used.
        rmasks: not used.
        output: [B, C, s * H, s * W].
        kernel_size: k, odd.
        group_size: the number of groups of channels with weights of their own.
        scale_factor: s.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill the gradients of features and masks; the arguments are those of `carafe_forward`."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """As `carafe_forward`, without tensors to work in."""
    fill(output, _carafe(kernel_size, group_size, scale_factor), features, masks)


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_backward`, without tensors to work in."""
    found = gradients(_carafe(kernel_size, group_size, scale_factor), [features, masks], grad_output)
    grad_input.copy_(found[0])
    grad_masks.copy_(found[1])


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill `data_col` with the windows of chosen places, for a convolution at these places only.

    Args:
        features: [1, C, H, W].
        mask_h_idx: int64 [M], the rows of the places.
        mask_w_idx: int64 [M], their columns.
        data_col: [C * kh * kw, M].
        kernel_h: kh.
        kernel_w: kw.
        pad_h: zeros above and below.
        pad_w: zeros on the left and on the right.
    """
    padded = F.pad(features[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # [C, H', W', kh, kw], a view
    data_col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).reshape(data_col.shape))


def masked_col2im_forward(
    data_col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, output: Tensor, height: int, width: int, channels: int
) -> None:
    """Write columns [C, M] to their places in `output` [1, C, H, W]."""
    output[0, :, mask_h_idx, mask_w_idx] = data_col


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, **sizes: int) -> None:
    """Fill `output` with the attention of every pixel to every pixel (PSANet, Zhao et al. 2018).

    Args:
        input: [B, hm * wm, H, W]; at each pixel, its attention to a window of hm x wm pixels around it.
        output: [B, H * W, H, W]. Pixels outside of the window get 0.
        psa_type: 0 ("collect"): a column of [H * W, H * W] is the attention of one pixel; 1 ("distribute"): a row.
        **sizes: `num_` (B), `h_feature`, `w_feature`, `h_mask`, `w_mask`, `half_h_mask`, `half_w_mask`.
    """
    fill(output, _psamask(psa_type, sizes), input)


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, **sizes: int) -> None:
    """Fill `grad_input` [B, hm * wm, H, W]; the other arguments are those of `psamask_forward`."""
    grad_input.copy_(gradients(_psamask(psa_type, sizes), [grad_input], grad_output)[0])


def _carafe(kernel_size: int, groups: int, scale: int) -> Callable[[Tensor, Tensor], Tensor]:
    def reassemble(features: Tensor, masks: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
        windows = windows.view(batch, groups, channels // groups, kernel_size**2, height, width)
        weights = masks.view(batch, groups, kernel_size**2, height, scale, width, scale)
        output = torch.einsum("bgckhw,bgkhiwj->bgchiwj", windows, weights)
        return output.reshape(batch, channels, height * scale, width * scale)

    return reassemble


def _psamask(psa_type: int, sizes: dict[str, int]) -> Callable[[Tensor], Tensor]:
    """For pixel (h, w) and pixel (y, x): the element (y - h + half, x - w + half) of the window of (h, w)."""

    def spread(masks: Tensor) -> Tensor:
        height, width = sizes["h_feature"], sizes["w_feature"]
        h, w = torch.arange(height, device=masks.device), torch.arange(width, device=masks.device)
        row = h[:, None] - h + sizes["half_h_mask"]  # [y, h]
        column = w[:, None] - w + sizes["half_w_mask"]  # [x, w]
        inside_row, inside_column = ((i >= 0) & (i < sizes[n]) for i, n in ((row, "h_mask"), (column, "w_mask")))
        windows = masks.view(len(masks), sizes["h_mask"], sizes["w_mask"], height, width)
        rows = (row * inside_row)[:, None, :, None]
        columns = (column * inside_column)[None, :, None, :]
        found = windows[:, rows, columns, h[None, None, :, None], w]  # [B, y, x, h, w]
        found = found * (inside_row[:, None, :, None] & inside_column[None, :, None, :])
        pairs = found.reshape(len(masks), height * width, height * width)
        return (pairs if psa_type == 0 else pairs.transpose(1, 2)).reshape(len(masks), -1, height, width)

    return spread
