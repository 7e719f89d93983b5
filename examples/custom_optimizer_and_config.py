"""Your own optimizer, preprocessing and choices of the algorithm.

python examples/custom_optimizer_and_config.py
"""

import timm
import torch

from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, TTTAdaptError
from ttt_adapt.data.street.scene import street_stream

torch.manual_seed(0)
model = timm.create_model("convnext_atto", num_classes=10)
branch = MAEBranch.attach(model, encoder="stages", mask_ratio=0.6, patch_size=16, loss_on="all")

config = StreamConfig.online(
    window=8,  # explicit memory: the last frames
    batch_size=4,
    source_pull=0.2,  # implicit memory, on a leash: weights go a fifth of the way back before each frame
    lr=1e-2,  # of the decoder; SGD takes larger steps than AdamW
    encoder_lr_scale=0.1,
    crop_size=(64, 64),  # the gradient step sees random crops, the prediction the whole frame
    grad_clip=1.0,  # SGD, unlike AdamW, follows the size of the gradient
    every=2,  # adapt on every second frame only
)


def sgd(groups):
    """Any function from parameter groups to an optimizer; the groups carry name, lr and weight_decay."""
    for group in groups:
        print(
            f"{group['name']:>17}: {len(group['params']):2d} tensors, lr {group['lr']:g}, decay {group['weight_decay']}"
        )
        if group["name"].startswith("encoder"):
            group["lr"] *= 0.5  # groups may be changed
    return torch.optim.SGD(groups, momentum=0.9)


# How uint8 frames become what the model takes, and how the model is called on them.
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

# Settings are checked when they are made, and errors say what to do.
try:
    StreamConfig.online(window=0)
except TTTAdaptError as error:
    print(f"refused: {error}")
