# Joint training on Cityscapes, semantic, from the zoo checkpoint of the model, with the schedule of mmseg.
_base_ = ["mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, loss_on="masked"),
)
load_from = "https://download.openmmlab.com/mmsegmentation/v0.5/mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024/mask2former_swin-s_8xb2-90k_cityscapes-512x1024_20221127_143802-9ab177f6.pth"
