# DeepLabV3+ with ResNet-101, trained on Cityscapes and tested on KITTI-STEP: a baseline that does not adapt.
_base_ = ["mmseg::deeplabv3plus/deeplabv3plus_r101-d8_4xb2-80k_cityscapes-512x1024.py", "../_base_/kitti_step.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

load_from = "https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3plus/deeplabv3plus_r101-d8_512x1024_80k_cityscapes/deeplabv3plus_r101-d8_512x1024_80k_cityscapes_20200606_114143-068fcfe9.pth"
test_dataloader = _base_.kitti_step_dataloader
test_evaluator = _base_.kitti_step_evaluator
