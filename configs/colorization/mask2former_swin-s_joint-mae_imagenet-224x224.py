# Joint training of the colorization model and its branch, from the model's own checkpoint (`load_from`).
_base_ = ["./mask2former_swin-s_imagenet-224x224.py"]

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, loss_on="masked"),
)
load_from = "work_dirs/mask2former_swin-s_imagenet-224x224/iter_90000.pth"
