"""Masks are told where the pixels are, whatever a model or its stem pads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.errors import EncoderError
from ttt_adapt.model.places import find_places, moved_to

SIZE = (20, 30)
TURNS = {
    "as it is": lambda x: x,
    "other values": lambda x: 0.5 - 3 * x,
    "padded right": lambda x: F.pad(x, (0, 12, 0, 5)),
    "padded around": lambda x: F.pad(x, (3, 9, 4, 1), value=1.0),
    "reflected": lambda x: F.pad(x, (3, 9, 4, 1), "reflect"),
    "repeated": lambda x: F.pad(x, (3, 9, 4, 1), "replicate"),
    "around in a circle": lambda x: F.pad(x, (3, 9, 4, 1), "circular"),
    "mirrored": lambda x: x.flip(3),
    "turned": lambda x: x.transpose(2, 3),
    "cropped": lambda x: x[..., 2:-3, 4:],
    "enlarged": lambda x: F.interpolate(x, scale_factor=2.0),
}


@pytest.mark.parametrize("turn", TURNS)
def test_values_of_pixels_go_where_the_pixels_go(turn):
    places = find_places(TURNS[turn], torch.zeros(1, 3, *SIZE))
    values = torch.rand(2, 1, *SIZE)
    moved = moved_to(places, values)
    expected = TURNS[turn](values)
    if turn == "other values":
        expected = values
    if turn == "padded around":
        expected = F.pad(values, (3, 9, 4, 1))  # padding of any value is no pixel
    assert torch.equal(moved, expected)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: (x - x.mean()) / x.std(),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x.flatten(2),
        lambda x: torch.cat([x, x.flip(3)]),
    ],
    ids=["resized", "pooled", "normalised", "a mean", "no map", "two in one"],
)
def test_pixels_that_are_mixed_have_no_place(mix):
    assert find_places(mix, torch.zeros(1, 3, *SIZE)) is None


# ---- models that pad


class Padded(nn.Module):
    """A small network that pads its images before it runs."""

    def __init__(self, pad, *stem) -> None:
        super().__init__()
        self.pad, self.head = pad, nn.Conv2d(8, 4, 1)
        stem = stem or (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.encoder = nn.Sequential(*stem)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.pad(x)))


def to_64(x: Tensor, mode: str = "constant", share: float = 0.5) -> Tensor:
    bottom, right = (-side % 64 for side in x.shape[-2:])
    top, left = int(share * bottom), int(share * right)
    return F.pad(x, (left, right - left, top, bottom - top), mode)


PADDINGS = {
    "right": lambda x: to_64(x, share=0.0),
    "left": lambda x: to_64(x, share=1.0),
    "around": to_64,
    "reflected": lambda x: to_64(x, "reflect"),
    "normalised and padded": lambda x: to_64((x - 0.4) / 0.2),
}


@pytest.mark.parametrize("padding", PADDINGS)
def test_hidden_pixels_are_told_where_the_stem_sees_them(padding):
    model = Padded(PADDINGS[padding]).eval()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, "encoder", image_size=(64, 128))
    images, seen = torch.ones(2, 3, 48, 96), {}
    mask = branch.draw_mask(images)
    stem = model.encoder[0].register_forward_pre_hook(lambda _m, args: seen.update(image=args[0]))
    channel = branch.mask_channel.register_forward_pre_hook(lambda _m, args: seen.update(hidden=args[0]))
    branch.reconstruct(images, mask=mask)
    stem.remove()
    channel.remove()
    hidden = (~mask)[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3).float()
    pad = PADDINGS["around" if padding == "normalised and padded" else padding]
    assert torch.equal(seen["hidden"], pad(hidden))
    assert torch.equal(seen["image"], PADDINGS[padding](images * (1 - hidden)))


class Straight(nn.Module):
    """A decoder whose prediction for a cell is the mean that the cell holds."""

    def __init__(self, specs) -> None:
        super().__init__()
        self.stride, self.unused = specs[0].stride, nn.Parameter(torch.zeros(1))

    def forward(self, features):
        return features.maps[0][:, :3].repeat_interleave(self.stride, 2).repeat_interleave(self.stride, 3)


def means(kernel: int, stride: int, padding: int = 0) -> nn.Conv2d:
    """A convolution whose first three channels are means over a cell, in the middle of its kernel."""
    conv = nn.Conv2d(3, 8, kernel, stride, padding, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        first = (kernel - stride + 1) // 2
        for c in range(3):
            conv.weight[c, c, first : first + stride, first : first + stride] = 1 / stride**2
    return conv


@pytest.mark.parametrize(
    ("pad", "stem"),
    [
        (PADDINGS["around"], (4, 4)),
        (PADDINGS["around"], (5, 4, 1)),
        (PADDINGS["left"], (8, 4, 2)),
        (PADDINGS["right"], (4, 4)),
        (PADDINGS["reflected"], (2, 2)),
        (nn.ZeroPad2d(2), (8, 4)),
        (nn.ReflectionPad2d(3), (7, 1)),
        (nn.ZeroPad2d((0, 1, 0, 1)), (3, 2)),
    ],
)
def test_the_reconstruction_lies_where_the_image_lies(pad, stem):
    """Visible pixels of images that are constant over each cell come back as they are."""
    model = Padded(pad, means(*stem)).eval()
    branch = MAEBranch.attach(model, "encoder", decoder=Straight, image_size=(64, 128), mask_ratio=0.5)
    images = torch.rand(2, 3, 6, 10).repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = branch.reconstruct(images)
    shown = out.mask.expand_as(images)
    inside = F.avg_pool2d((~out.mask).float(), 9, 1, 4, count_include_pad=False).expand_as(images) == 0
    where = shown & (inside if stem[0] > stem[1] else shown)
    assert where.sum() > 500
    if stem == (3, 2):  # the kernel's middle lies half a pixel beside the cell's
        images, where = images[..., 8:, 8:], where[..., 8:, 8:]
        assert (out.prediction[..., 8:, 8:] - images).abs()[where].median() < 1e-6
    else:
        torch.testing.assert_close(out.prediction[where], images[where])


@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(3), lambda x: x.roll(5, 3), lambda x: F.interpolate(x, scale_factor=2.0)]
)
def test_images_that_are_mirrored_rolled_or_resized_inside_are_refused(turn):
    model = Padded(turn).eval()
    with left_as_it_was(model), pytest.raises(EncoderError, match=r"\(64, 128\).*let it take images as the stem sees"):
        MAEBranch.attach(model, "encoder", image_size=(64, 128))


def test_a_stem_that_is_called_twice_is_told_both_times_what_it_sees():
    class Twice(Padded):
        def forward(self, x):
            return self.head(self.encoder(x) + self.encoder(x.flip(3)).flip(3))

    model = Twice(None).eval()
    model.whole, told = nn.Identity(), []
    branch = MAEBranch.attach(model, "head", image_size=(64, 96))
    images = torch.randn(1, 3, 64, 96)
    mask = branch.draw_mask(images)
    branch.mask_channel.register_forward_pre_hook(lambda _m, args: told.append(args[0]))
    branch.reconstruct(images, mask=mask)
    hidden = (~mask)[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3).float()
    assert len(told) == 2
    assert torch.equal(told[0], hidden)
    assert torch.equal(told[1], hidden.flip(3))


# ---- stems that pad


class SameConv(nn.Conv2d):
    """Pads so that ceil(size / stride) cells come out; `late` says how much of the odd pixel goes to the end."""

    late = True

    def forward(self, x):
        pads = []
        for size, stride, kernel in zip(x.shape[:1:-1], self.stride, self.kernel_size, strict=False):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            first = total // 2 if self.late else -(-total // 2)
            pads += [first, total - first]
        return super().forward(F.pad(x, pads))


class EarlyConv(SameConv):
    late = False


class CausalConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[1] - 1, 0, self.kernel_size[0] - 1, 0)))


class StandardConv(SameConv):
    """With standardised weights, as NFNets have them."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input=F.pad(x, (1, 1, 1, 1)), weight=weight, bias=self.bias, stride=self.stride)


STEMS = {
    "same": lambda: SameConv(3, 8, 3, 2),
    "same, stride 1": lambda: SameConv(3, 8, 3),
    "same, even kernel": lambda: SameConv(3, 8, 4, 2),
    "same, the odd pixel first": lambda: EarlyConv(3, 8, 3, 2),
    "causal": lambda: CausalConv(3, 8, 3, 2),
    "standardised": lambda: StandardConv(3, 8, 3, 2),
    "reflected": lambda: nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect"),
    "in a circle": lambda: nn.Conv2d(3, 8, (3, 5), 1, (1, 2), padding_mode="circular"),
    "same by name": lambda: nn.Conv2d(3, 8, 3, 1, "same", dilation=2),
}


@pytest.mark.parametrize("stem", STEMS)
def test_the_mask_channel_pads_as_its_stem_does(stem):
    torch.manual_seed(0)
    model = Padded(nn.Identity(), STEMS[stem](), nn.ReLU()).eval()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model, "encoder")
    three = model.encoder[0]
    one = type(three)(
        1, 8, three.kernel_size, three.stride, three.padding, three.dilation, padding_mode=three.padding_mode
    )
    nn.init.normal_(branch.mask_channel.weight)
    for size in ((32, 48), (33, 47), (18, 31)):
        hidden = (torch.rand(2, 1, *size) < 0.5).float()
        with torch.no_grad():
            one.bias.zero_()
            weight = branch.mask_channel.weight
            if stem == "standardised":
                expected = F.conv2d(hidden, weight, None, 2, 1)
            else:
                one.weight.copy_(weight)
                expected = one(hidden)
            told = branch.mask_channel(hidden)
        assert told.shape == three(torch.zeros(1, 3, *size)).expand(2, -1, -1, -1).shape
        torch.testing.assert_close(told, expected)
    branch.loss(torch.randn(2, 3, 33, 47)).backward()
    assert branch.mask_channel.weight.grad is not None


def test_places_that_were_found_under_inference_mode_serve_a_gradient_step():
    model = Padded(to_64, SameConv(3, 8, 3, 2)).eval()
    branch = MAEBranch.attach(model, "encoder", image_size=(64, 64))
    images = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        branch.reconstruct(images)
    branch.loss(images).backward()
    assert branch.mask_channel.weight.grad is not None


def test_a_stem_that_mixes_pixels_before_it_convolves_them_is_refused():
    class Blurred(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.avg_pool2d(x, 3, 1, 1))

    model = Padded(nn.Identity(), Blurred(3, 8, 3, 2, 1)).eval()
    with left_as_it_was(model), pytest.raises(EncoderError, match=r"Blurred.*mixes pixels.*another stem"):
        MAEBranch.attach(model, "encoder")


def test_images_of_one_size_are_looked_at_once():
    model, calls = Padded(to_64).eval(), []
    branch = MAEBranch.attach(model, "encoder", image_size=(64, 64))
    images = torch.randn(1, 3, 48, 80)
    branch.loss(images)
    model.encoder[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        branch.loss(images)
    assert len(calls) == 3


@pytest.mark.parametrize("axes", [(3,), (2,), (2, 3)])
def test_images_that_are_averaged_with_their_mirror_images_are_refused(axes):
    model = Padded(lambda x: (x + x.flip(axes)) / 2).eval()
    with left_as_it_was(model), pytest.raises(EncoderError, match="averages them with turned ones"):
        MAEBranch.attach(model, "encoder", image_size=(64, 128))


@pytest.mark.parametrize(
    "normalise",
    [
        lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True),
        lambda x: x / x.amax((1, 2, 3), keepdim=True),
        lambda x: x - F.avg_pool2d(x, 5, 1, 2),
    ],
)
def test_images_that_are_normalised_each_by_itself_are_taken(normalise):
    model = Padded(normalise).eval()
    assert MAEBranch.attach(model, "encoder", image_size=(64, 128)).masking == "pixels"
