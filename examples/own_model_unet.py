"""Your own model, no library behind it: a U-Net whose decoder for reconstruction is a copy of its head.

python examples/own_model_unet.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig

torch.manual_seed(0)


def block(inside, outside):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.ReLU())


class Encoder(nn.Module):
    """Returns its maps from fine to coarse; lists, tuples and dicts of maps are all understood."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])

    def forward(self, x):
        maps = []
        for i, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        return maps


class Head(nn.Module):
    """Up again with skip connections; the last layer is a convolution over a map, as copy_head needs it."""

    def __init__(self, classes):
        super().__init__()
        self.up = nn.ModuleList([block(64 + 32, 32), block(32 + 16, 16)])
        self.out = nn.Conv2d(16, classes, 1)

    def forward(self, maps):
        x = maps[-1]
        for up, skip in zip(self.up, maps[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return self.out(x)


class UNet(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.encoder, self.head = Encoder(), Head(classes)

    def forward(self, x):
        return self.head(self.encoder(x))


model = UNet().eval()
frames = [torch.rand(1, 3, 8, 12) for _ in range(3)]
frames = [F.interpolate(frame, (70, 101), mode="bicubic") for frame in frames for _ in range(4)]  # any H x W
with torch.no_grad():
    before = model(frames[0])

# The decoder g copies the head and changes its last layer, from classes to pixels: the paper's choice.
branch = MAEBranch.attach(model, encoder="encoder", decoder="copy_head")
adapted = sum(p.numel() for p in branch.encoder_parameters().values())
print(f"masking {branch.masking}; {adapted} encoder parameters adapt, {len(list(branch.parameters()))} tensors are new")
print(f"the model has the same keys: {not any('mask' in key for key in model.state_dict())}")

# Frames are float tensors that the model takes as they are, so no normalisation has to be known.
with StreamAdapter(model, branch, config=StreamConfig.online(window=4, batch_size=4, lr=1e-3)) as adapter:
    for frame in frames:
        logits = adapter.step(frame)
        print(f"frame {adapter.last.frame_index:2d}: logits {tuple(logits.shape)}, loss {adapter.last.losses[0]:.4f}")

with torch.no_grad():
    print(f"detached, the model predicts as before: {torch.equal(model(frames[0]), before)}")
