# COCO Videos, instance: both memories, the settings of the paper's released code, on whole frames: without its scale
# jitter, flips and padded crops.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

model = dict(branch=dict(mask_ratio=0.85, loss_on="all"))
custom_hooks = [dict(type="OnlineTTTHook", arm="paper")]
