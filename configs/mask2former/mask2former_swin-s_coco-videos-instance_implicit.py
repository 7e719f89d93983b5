# COCO Videos, instance, arm implicit: the weights go on from frame to frame, and the window holds one frame.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="implicit")]
