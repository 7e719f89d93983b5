# KITTI-STEP, semantic, arm paper: like online, with the settings of the paper's released code.
_base_ = ["./mask2former_swin-s_kitti-step.py"]

model = dict(branch=dict(mask_ratio=0.85, loss_on="all"))
custom_hooks = [dict(type="OnlineTTTHook", arm="paper", crop_size=(512, 1024))]
