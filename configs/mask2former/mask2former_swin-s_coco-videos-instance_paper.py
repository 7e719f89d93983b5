# COCO Videos, instance, arm paper: like online, with the settings of the paper's released code. Gradient steps take
# whole frames; the released code changes their scale, flips them and pads crops.
_base_ = ["./mask2former_swin-s_coco-videos-instance.py"]

model = dict(branch=dict(mask_ratio=0.85, loss_on="all"))
custom_hooks = [dict(type="OnlineTTTHook", arm="paper")]
