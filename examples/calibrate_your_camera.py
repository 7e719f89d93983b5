"""Calibrate a model on ordinary frames of your camera, without labels and training, then stream a video through it.

    python examples/calibrate_your_camera.py                                  # a rendered street, random weights
    python examples/calibrate_your_camera.py day.mp4 night.mp4 --pretrained   # your videos, ImageNet weights
    python examples/calibrate_your_camera.py stills/ night.mp4 --pretrained   # a folder of pictures of usual days

What the first argument shows counts as usual. In the second, a frame that looks usual is predicted as before, and any
other frame is corrected, the more the further it is from the stills. A classifier stands for any model here: give
`calibrate` and the adapter your own, with its `preprocess` if it is not of timm.
"""

import argparse
from itertools import islice

import timm

from ttt_adapt import StreamAdapter, calibrate

SIZE = (96, 128)  # height and width of the rendered street
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stills", nargs="?", help="video or folder of usual frames; a rendered street by day without it")
parser.add_argument("video", nargs="?", help="file, folder, camera index or URL; the same frames without it")
parser.add_argument("--model", default="convnext_atto", help="a model of timm")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--count", type=int, default=16, help="stills; better some 40 for a model that you use")
parser.add_argument("--every", type=int, default=15, help="distance of two stills in a video, in frames")
parser.add_argument("--frames", type=int, default=12, help="frames of the video to show")
arguments = parser.parse_args()

if arguments.stills is None:
    from ttt_adapt.data.street import street_stills, street_stream

    stills = [frame for frame, _labels in street_stills(arguments.count, SIZE)]
    frames = (frame for frame, _labels in street_stream(arguments.frames, SIZE))  # night, fog and rain come and go
else:
    from ttt_adapt.video import open_video

    with open_video(arguments.stills) as day:
        stills = list(islice(day, 0, arguments.count * arguments.every, arguments.every))
    frames = open_video(arguments.video or arguments.stills)

model = timm.create_model(arguments.model, pretrained=arguments.pretrained).eval()
calibration = calibrate(model, stills)  # keep it: calibration.save("camera.safetensors"), Calibration.load(...)
rule = calibration.rule
print(f"{calibration.stills} stills of {calibration.size}; corrected at: {rule.points}, up to {rule.largest:.0%}")
print(f"95 % of the stills have a drift below {calibration.limit:.1f}")

with StreamAdapter(model, calibration=calibration) as adapter:
    for index, logits in enumerate(adapter.stream(islice(frames, arguments.frames))):
        best = logits.softmax(-1).max(-1)
        far = "" if adapter.drift <= calibration.limit else "  unlike the stills"
        print(f"frame {index:3d}: drift {adapter.drift:5.1f}, class {best.indices.item():4d}{far}")
# After the block the model is what it was before. Its weights have never changed.
