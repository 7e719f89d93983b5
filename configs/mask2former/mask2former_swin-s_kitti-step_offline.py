# KITTI-STEP, semantic: 1000 steps on all frames before the first prediction (looks ahead).
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="offline", crop_size=(512, 1024))]
