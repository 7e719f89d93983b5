# COCO Videos, panoptic, arm explicit: a window of recent frames; each frame starts from the source weights.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit")]
