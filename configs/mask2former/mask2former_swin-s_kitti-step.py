# The jointly trained model on KITTI-STEP, semantic: data and scores. Configs that inherit from it add an arm.
_base_ = ["./mask2former_swin-s_joint-mae_cityscapes-512x1024.py", "../_base_/kitti_step.py"]

load_from = None  # `ttt-adapt mm test CONFIG CHECKPOINT`: the checkpoint of the joint training
test_dataloader = _base_.kitti_step_dataloader
test_evaluator = _base_.kitti_step_evaluator
