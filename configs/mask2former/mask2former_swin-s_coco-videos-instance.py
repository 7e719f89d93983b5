# The jointly trained model on COCO Videos, instance: data and scores. Configs that inherit from it add an arm.
_base_ = ["./mask2former_swin-s_joint-mae_coco-instance.py", "../_base_/coco_videos.py"]

load_from = None  # `ttt-adapt mm test CONFIG CHECKPOINT`: the checkpoint of the joint training
test_dataloader = _base_.coco_videos_instance_dataloader
test_evaluator = _base_.coco_videos_instance_evaluator
