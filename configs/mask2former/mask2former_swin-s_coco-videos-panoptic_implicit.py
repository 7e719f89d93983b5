# COCO Videos, panoptic: weights go on, window of one frame.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="implicit")]
