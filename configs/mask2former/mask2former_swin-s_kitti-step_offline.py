# KITTI-STEP, semantic, arm offline: 1000 steps on all frames of a video before its first prediction.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="offline", crop_size=(512, 1024))]
