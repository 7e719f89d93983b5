# KITTI-STEP, semantic, arm explicit: a window of recent frames; each frame starts from the source weights.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit", crop_size=(512, 1024))]
