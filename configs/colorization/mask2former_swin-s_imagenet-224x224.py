# Colorization with Swin-S and a Mask2Former head, trained on pictures in ImageNet's folders.
_base_ = [
    "mmseg::mask2former/mask2former_swin-s_8xb2-90k_cityscapes-512x1024.py",
    "../_base_/imagenet_colours.py",
]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

data_preprocessor = dict(size=(224, 224), test_cfg=dict(size_divisor=32))
model = dict(type="Colorizer", data_preprocessor=data_preprocessor)

train_dataloader = _base_.colour_train_dataloader
test_dataloader = _base_.colour_test_dataloader
test_evaluator = _base_.colour_evaluator
test_pipeline = _base_.colour_test_pipeline
val_dataloader = None
val_evaluator = None
val_cfg = None
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=90000)
default_hooks = dict(checkpoint=dict(interval=5000, save_best=None), visualization=None)
