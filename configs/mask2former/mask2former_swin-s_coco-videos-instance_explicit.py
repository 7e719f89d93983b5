# COCO Videos, instance: window of frames, weights do not go on.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit")]
