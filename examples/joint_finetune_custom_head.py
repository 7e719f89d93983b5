"""Train a model with a head of your own and a reconstruction branch together, in a plain PyTorch loop.

The model is any nn.Module: here a small timm backbone with a head that finds road, car, sky ... in a rendered street.
The branch adds one term to the loss. Afterwards model and branch follow a drive through night, fog and rain.
The training takes seconds, far too short for a good model: the example shows the loop.

    python examples/joint_finetune_custom_head.py
"""

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.data.street import CLASSES, street_stills, street_stream

SIZE, EPOCHS, BATCH = (64, 96), 6, 8
torch.manual_seed(0)


class StreetNet(nn.Module):
    """A backbone and a custom head: a 1 x 1 convolution on two levels of features."""

    def __init__(self):
        super().__init__()
        # BatchNorm works too: images with hidden patches never enter its running statistics.
        self.backbone = timm.create_model("convnext_atto", features_only=True, out_indices=(0, 1))
        fine, coarse = self.backbone.feature_info.channels()
        self.fine, self.coarse = nn.Conv2d(fine, len(CLASSES), 1), nn.Conv2d(coarse, len(CLASSES), 1)

    def forward(self, images):
        fine, coarse = self.backbone(images)
        logits = self.fine(fine) + F.interpolate(self.coarse(coarse), fine.shape[-2:])
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")


normalize = Normalize()  # ImageNet's mean and std
stills = list(street_stills(32, SIZE))
images = torch.cat([normalize(picture) for picture, _ in stills])
labels = torch.stack([torch.from_numpy(label).long() for _, label in stills])

model = StreetNet()
branch = MAEBranch.attach(model, encoder="backbone", patch_size=8)  # the model itself stays as it is
optimizer = torch.optim.AdamW([*model.parameters(), *branch.parameters()], lr=2e-3)

for epoch in range(EPOCHS):
    model.train()
    sums = torch.zeros(2)
    for batch in torch.randperm(len(images)).split(BATCH):
        main = F.cross_entropy(model(images[batch]), labels[batch])
        mae = branch.loss(images[batch])  # hides patches and rebuilds them; the one extra term
        (main + mae).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums += torch.tensor([main.item(), mae.item()]) * len(batch) / len(images)
    print(f"epoch {epoch + 1}/{EPOCHS}: main loss {sums[0]:.3f}, reconstruction loss {sums[1]:.3f}")

model.eval()
# Before each frame the weights go a tenth of the way back to the trained ones, so that the head still fits them.
config = StreamConfig.online(window=8, batch_size=2, lr=1e-4, source_pull=0.1)
with StreamAdapter(model, branch, config=config, preprocess=normalize) as adapter:
    for i, (frame, label) in enumerate(street_stream(12, SIZE, seed=1)):
        with torch.no_grad():
            before = adapter.predict(frame).argmax(1)  # with the weights that the frames before have left
        after = adapter.step(frame).argmax(1)
        if i % 3 == 0:
            truth = torch.from_numpy(label)
            scores = [(prediction[0] == truth).float().mean().item() for prediction in (before, after)]
            print(
                f"frame {i:2d}: {scores[0]:.3f} of the pixels right before adapting to it, {scores[1]:.3f} after; "
                f"reconstruction loss {adapter.last.losses[0]:.3f}"
            )
