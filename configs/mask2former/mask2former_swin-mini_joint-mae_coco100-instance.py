# Joint training of the small Mask2Former and its branch, from the Mask2Former's own checkpoint (`load_from`); and its
# test with the hook. `--arm fixed` tests without adaptation.
_base_ = ["./mask2former_swin-mini_coco100-instance.py"]

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, image_size=(160, 160)),
)
load_from = "work_dirs/mask2former_swin-mini_coco100-instance/iter_1000.pth"
custom_hooks = [dict(type="OnlineTTTHook", window=16, batch_size=8)]
