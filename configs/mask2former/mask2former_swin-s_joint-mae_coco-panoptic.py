# Joint training on COCO, panoptic, from the zoo checkpoint of the model, with the schedule of mmdet.
_base_ = [
    "mmdet::mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py",
    "../_base_/coco_panoptic.py",
]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, loss_on="masked"),
)
load_from = "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco-panoptic_20220329_225200-4a16ded7.pth"

train_dataloader = _base_.coco_panoptic_train_dataloader
val_dataloader = _base_.coco_panoptic_test_dataloader
test_dataloader = _base_.coco_panoptic_test_dataloader
val_evaluator = _base_.coco_panoptic_evaluator
test_evaluator = _base_.coco_panoptic_evaluator
