"""Stop in the middle of a stream and go on later, as if nothing had happened.

The state holds the adapted weights, the optimizer, the window, the random state and the frame counter.

    python examples/save_and_resume_stream.py
"""

import tempfile
from pathlib import Path

import timm
import torch

from ttt_adapt import StreamAdapter, StreamConfig
from ttt_adapt.data.street.scene import street_stream

CONFIG = StreamConfig.online(window=4, batch_size=2, restart_optimizer=False)  # AdamW's moments travel on, too
frames = [frame for frame, _labels in street_stream(8, size=(64, 96))]


def new_adapter():
    """What a program does when it starts: the same trained model, the same settings."""
    torch.manual_seed(0)  # stands for loading trained weights of model and branch
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=96, img_size=(64, 96), num_classes=10)
    return StreamAdapter(model, encoder="norm", config=CONFIG)


with new_adapter() as adapter:
    unbroken = [adapter.step(frame).clone() for frame in frames]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "stream.pt"
    with new_adapter() as adapter:
        for frame in frames[:4]:
            adapter.step(frame)
        torch.save(adapter.state_dict(), file)
        print(f"saved after {adapter.last.frame_index + 1} frames: {file.stat().st_size / 1e6:.1f} MB")

    with new_adapter() as adapter:  # another process, another day
        adapter.load_state_dict(torch.load(file, weights_only=True))
        resumed = [adapter.step(frame).clone() for frame in frames[4:]]

same = all(torch.equal(a, b) for a, b in zip(unbroken[4:], resumed, strict=True))
print(f"the resumed stream equals the unbroken one, bit for bit: {same}")
