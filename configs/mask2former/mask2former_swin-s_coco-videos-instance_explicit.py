# COCO Videos, instance, arm explicit: a window of recent frames; each frame starts from the source weights.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit")]
