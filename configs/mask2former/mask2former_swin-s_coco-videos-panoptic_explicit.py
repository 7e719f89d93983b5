# COCO Videos, panoptic: window of frames, weights do not go on.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit")]
