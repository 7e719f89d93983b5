"""Let any timm classifier keep learning from the video it is watching.

    python examples/stream_timm_classifier.py                              # a rendered street, random weights
    python examples/stream_timm_classifier.py video.mp4 --pretrained       # your video, ImageNet weights

The branch is not trained here, so the first frames mostly teach its decoder, and the classifier gains nothing. To gain
from adaptation, train model and branch together first: see joint_finetune_custom_head.py.
"""

import argparse
from itertools import islice

import timm

from ttt_adapt import StreamAdapter, StreamConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "video", nargs="?", help="file, folder of frames, camera index or URL; a rendered street without it"
)
parser.add_argument("--model", default="resnet18")
parser.add_argument("--encoder", default="auto", help="module where the encoder ends: layer4, stages, norm, ...")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--frames", type=int, default=8)
arguments = parser.parse_args()

model = timm.create_model(arguments.model, pretrained=arguments.pretrained)

if arguments.video is None:
    from ttt_adapt.data.street import street_stream

    frames = (frame for frame, _labels in street_stream(arguments.frames, size=(96, 128)))
else:
    from ttt_adapt.video import open_video

    frames = open_video(arguments.video)

# Frames are uint8 RGB arrays. The adapter normalises them with the mean and std that timm knows of this model.
config = StreamConfig.online(window=8, batch_size=2)
with StreamAdapter(model, encoder=arguments.encoder, config=config) as adapter:
    for logits in adapter.stream(islice(frames, arguments.frames)):  # lazy: only the window is kept
        report = adapter.last
        best = logits.softmax(-1).max(-1)
        print(
            f"frame {report.frame_index:3d}: class {best.indices.item():4d} with {best.values.item():.2f}, "
            f"reconstruction loss {report.losses[0]:.4f}, {report.ms:.0f} ms"
        )
# After the block the model is what it was before: its own weights, no hooks.
