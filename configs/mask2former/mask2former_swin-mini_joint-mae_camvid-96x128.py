# Joint training of the small Mask2Former and its branch, from the Mask2Former's own checkpoint (`load_from`).
_base_ = ["./mask2former_swin-mini_camvid-96x128.py"]

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, image_size=(96, 128)),
)
load_from = "work_dirs/mask2former_swin-mini_camvid-96x128/iter_1500.pth"
