"""Stop in the middle of a video and go on later, as if nothing had happened.

The saved state holds the adapted weights, the optimizer, the window, the random state and the index of the frame.

    python examples/save_and_resume_stream.py
"""

import tempfile
from pathlib import Path

import torch

from ttt_adapt import StreamAdapter, StreamConfig
from ttt_adapt.data.street import WEIGHTS, StreetClip
from ttt_adapt.tasks.checkpoint import load_checkpoint

CONFIG = StreamConfig.online(window=4, batch_size=2)
frames = [frame for frame, _labels in StreetClip(seed=0, frames=8)]


def new_adapter():
    """What a program does when it starts: load the trained model and its branch, and take the same settings."""
    trained = load_checkpoint(WEIGHTS)
    return StreamAdapter(trained.model, trained.branch, config=CONFIG, preprocess=trained.spec.preprocess())


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
