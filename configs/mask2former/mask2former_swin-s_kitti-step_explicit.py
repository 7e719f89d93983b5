# KITTI-STEP, semantic: window of frames, weights do not go on.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="explicit", crop_size=(512, 1024))]
