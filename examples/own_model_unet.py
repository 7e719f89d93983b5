"""Your own model, without a library behind it: a U-Net, and a decoder for reconstruction that is a copy of its head.

It learns the classes of a rendered street and the reconstruction of hidden patches together, then follows a video.
The training takes seconds, far too short for a good model: the example shows the steps.

    python examples/own_model_unet.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.data.street import CLASSES, street_stills, street_stream

SIZE = (70, 101)  # height and width; any size will do
torch.manual_seed(0)


def block(inside, outside):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(4, outside), nn.ReLU())


class Encoder(nn.Module):
    """Returns its maps from fine to coarse. Lists, tuples and dicts of maps are all understood."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])

    def forward(self, x):
        maps = []
        for i, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        return maps  # [B, 16, H, W], [B, 32, H / 2, W / 2], [B, 64, H / 4, W / 4]


class Head(nn.Module):
    """Goes up again with skip connections. It ends in a convolution over a map, as copy_head needs it."""

    def __init__(self, classes):
        super().__init__()
        self.up = nn.ModuleList([block(64 + 32, 32), block(32 + 16, 16)])
        self.out = nn.Conv2d(16, classes, 1)

    def forward(self, maps):
        x = maps[-1]
        for up, skip in zip(self.up, maps[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return self.out(x)  # [B, classes, H, W]


class UNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.encoder, self.head = Encoder(), Head(classes)

    def forward(self, x):
        return self.head(self.encoder(x))


# Labelled images: [N, 3, H, W] as the model takes them, and the class of every pixel [N, H, W].
normalize = Normalize()
stills = list(street_stills(12, SIZE))
images = torch.cat([normalize(picture) for picture, _ in stills])
labels = torch.stack([torch.from_numpy(classes).long() for _, classes in stills])

model = UNet(len(CLASSES))
# The decoder copies the head and changes its last layer, from classes to pixels. This is the paper's choice.
branch = MAEBranch.attach(model, encoder="encoder", decoder="copy_head")
adapted = sum(p.numel() for p in branch.encoder_parameters().values())
print(f"masking {branch.masking}; {adapted} encoder parameters adapt, {len(list(branch.parameters()))} tensors are new")
print(f"the model has the same keys: {not any('mask' in key for key in model.state_dict())}")

# Joint training: the loss of the task, and the loss of the reconstruction.
optimizer = torch.optim.AdamW([*model.parameters(), *branch.parameters()], lr=2e-3)
for epoch in range(4):
    for batch in torch.randperm(len(images)).split(4):
        task = F.cross_entropy(model(images[batch]), labels[batch])
        rebuilt = branch.loss(images[batch])
        (task + rebuilt).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: cross-entropy {task.item():.3f}, reconstruction {rebuilt.item():.3f}")

model.eval()
with torch.no_grad():
    before = model(images[:1])

# Test time: no labels. uint8 frames are normalised as the training images were.
config = StreamConfig.online(window=4, batch_size=4)
with StreamAdapter(model, branch, config=config, preprocess=normalize) as adapter:
    for frame, _labels in street_stream(6, SIZE):
        logits = adapter.step(frame)
        print(f"frame {adapter.last.frame_index}: logits {tuple(logits.shape)}, loss {adapter.last.losses[0]:.4f}")

with torch.no_grad():
    print(f"detached, the model predicts as before: {torch.equal(model(images[:1]), before)}")
