# COCO Videos, instance: every frame on its own.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="no-memory")]
