# KITTI-STEP, semantic: every frame on its own.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="no-memory", crop_size=(512, 1024))]
