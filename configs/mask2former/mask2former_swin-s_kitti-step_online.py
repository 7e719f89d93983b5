# KITTI-STEP, semantic, arm online: the weights go on, and the window holds recent frames.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="online", crop_size=(512, 1024))]
