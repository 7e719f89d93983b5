# KITTI-STEP, semantic, arm implicit: the weights go on from frame to frame, and the window holds one frame.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="implicit", crop_size=(512, 1024))]
