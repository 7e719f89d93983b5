# KITTI-STEP, semantic: as trained.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="fixed")]
