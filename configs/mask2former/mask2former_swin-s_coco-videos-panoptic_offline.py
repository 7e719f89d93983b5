# COCO Videos, panoptic: 1000 steps on all frames before the first prediction (looks ahead).
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="offline")]
