# COCO Videos, instance: weights go on, window of one frame.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="implicit")]
