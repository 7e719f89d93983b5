# COCO Videos, panoptic, arm no-memory: each frame starts from the source weights, and the window holds it alone.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="no-memory")]
