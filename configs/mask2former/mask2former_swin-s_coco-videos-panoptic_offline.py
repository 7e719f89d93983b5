# COCO Videos, panoptic, arm offline: 1000 steps on all frames of a video before its first prediction.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="offline")]
