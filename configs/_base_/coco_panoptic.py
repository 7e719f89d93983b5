# COCO panoptic without `panopticapi`, which mmdet's own scoring needs and which is not on the package index.
# A config that inherits from mmdet's uses the entries by name: `val_dataloader = _base_.coco_panoptic_test_dataloader`.
coco_panoptic_test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadPicture", to_float32=True),
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
coco_panoptic_train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadPicture", to_float32=True),
            dict(type="LoadPanopticSegments"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
            dict(
                type="RandomCrop",
                crop_size=(1024, 1024),
                crop_type="absolute",
                recompute_bbox=True,
                allow_negative_crop=True,
            ),
            dict(type="PackDetInputs"),
        ]
    )
)
coco_panoptic_evaluator = [dict(type="StreamPQMetric")]
