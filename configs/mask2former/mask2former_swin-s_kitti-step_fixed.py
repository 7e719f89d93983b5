# KITTI-STEP, semantic, arm fixed: the model as trained, without adaptation.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="fixed")]
