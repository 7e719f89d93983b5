# The same with the masks and the loss of the paper's released code: 0.85 of the patches are hidden, and the error is
# over all pixels.
_base_ = ["./mask2former_swin-s_joint-mae_coco-panoptic.py"]

model = dict(branch=dict(mask_ratio=0.85, loss_on="all"))
