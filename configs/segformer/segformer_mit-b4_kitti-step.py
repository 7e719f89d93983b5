# SegFormer-B4, trained on Cityscapes and tested on KITTI-STEP: a baseline that does not adapt.
_base_ = ["mmseg::segformer/segformer_mit-b4_8xb1-160k_cityscapes-1024x1024.py", "../_base_/kitti_step.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

load_from = "https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b4_8x1_1024x1024_160k_cityscapes/segformer_mit-b4_8x1_1024x1024_160k_cityscapes_20211207_080709-07f6c333.pth"
test_dataloader = _base_.kitti_step_dataloader
test_evaluator = _base_.kitti_step_evaluator
