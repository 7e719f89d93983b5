# COCO Videos, panoptic, arm online: the weights go on, and the window holds recent frames.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="online")]
