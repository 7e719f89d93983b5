# Joint training on COCO, panoptic, from the zoo checkpoint of the main task, by the upstream schedule.
_base_ = ["mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

model = dict(
    type="JointMAE",
    model=_base_.model,
    branch=dict(encoder="backbone", decoder="copy_head", mask_ratio=0.8, loss_on="masked"),
)
load_from = "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic_20220326_224553-3ec9e0ae.pth"

# Upstream's loading and scoring need `panopticapi`, which is not on the package index; these do not.
image_size = (1024, 1024)
_stream = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile", to_float32=True),
            dict(type="Resize", scale=(1333, 800), keep_ratio=True),
            dict(
                type="PackDetInputs",
                meta_keys=(
                    "img_id",
                    "img_path",
                    "ori_shape",
                    "img_shape",
                    "scale_factor",
                    "seg_map_path",
                    "segments_info",
                ),
            ),
        ]
    )
)
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile", to_float32=True),
            dict(type="LoadPanopticSegments"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomResize", scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
            dict(
                type="RandomCrop",
                crop_size=image_size,
                crop_type="absolute",
                recompute_bbox=True,
                allow_negative_crop=True,
            ),
            dict(type="PackDetInputs"),
        ]
    )
)
val_dataloader = _stream
test_dataloader = _stream
val_evaluator = [dict(type="StreamPQMetric")]
test_evaluator = val_evaluator
