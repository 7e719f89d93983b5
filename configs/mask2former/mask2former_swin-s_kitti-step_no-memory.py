# KITTI-STEP, semantic, arm no-memory: each frame starts from the source weights, and the window holds it alone.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="no-memory", crop_size=(512, 1024))]
