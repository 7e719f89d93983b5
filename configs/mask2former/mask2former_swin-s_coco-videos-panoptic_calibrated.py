# COCO Videos, panoptic, arm calibrated: a frame far from the training set has its own statistics; no gradient.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="calibrated", stills=40)]
