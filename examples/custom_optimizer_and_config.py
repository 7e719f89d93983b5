"""Your own optimizer, preprocessing and settings.

The model has random weights: the example shows where settings go, and no result.

    python examples/custom_optimizer_and_config.py
"""

import timm
import torch

from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.data.street import street_stream

torch.manual_seed(0)
model = timm.create_model("convnext_atto", num_classes=10)
branch = MAEBranch.attach(model, encoder="stages", mask_ratio=0.6, patch_size=16, loss_on="all")

config = StreamConfig.online(
    window=8,  # each step draws from the last 8 frames
    batch_size=4,
    source_pull=0.2,  # before each frame the weights go a fifth of the way back to the source weights
    lr=1e-2,  # of the decoder; SGD needs a larger rate than AdamW
    encoder_lr_scale=0.1,  # the encoder's rate is a tenth of that
    crop_size=(64, 64),  # the gradient step sees random crops, the prediction sees the whole frame
    grad_clip=1.0,  # SGD follows the size of the gradient, unlike AdamW
    every=2,  # adapt to every second frame only
)


def sgd(groups):
    """Makes an optimizer of parameter groups. Each group has a name, a learning rate and a weight decay."""
    for group in groups:
        print(
            f"{group['name']:>17}: {len(group['params']):2d} tensors, lr {group['lr']:g}, decay {group['weight_decay']}"
        )
        if group["name"].startswith("encoder"):
            group["lr"] *= 0.5  # you may change the groups
    return torch.optim.SGD(groups, momentum=0.9)


# `preprocess` turns a uint8 frame into what the model takes; `predict` calls the model on it.
normalize = Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
with StreamAdapter(
    model,
    branch,
    config=config,
    preprocess=normalize,
    predict=lambda x: model(x).softmax(-1),
    optimizer=sgd,
) as adapter:
    for frame, _labels in street_stream(6, size=(64, 96)):
        probabilities = adapter.step(frame)
        report = adapter.last
        print(
            f"frame {report.frame_index}: best class {probabilities.argmax().item()}, "
            + (f"loss {report.losses[0]:.3f}, gradient {report.grad_norm:.2f}" if report.adapted else report.reason)
        )
    adapter.reset()  # another video begins: source weights, empty window

# Settings are checked at once, and errors say what to do.
try:
    StreamConfig.online(window=0)
except TTTAdaptError as error:
    print(f"refused: {error}")
