# Joint training on COCO, instance, from the zoo checkpoint of the model, with the schedule of mmdet.
_base_ = ["mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, loss_on="masked"),
)
load_from = "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
