# KITTI-STEP as streams: frames of at most 1024 x 2048 (they become 618 x 2048), one at a time, video after video. A
# config that inherits from a Cityscapes config uses the entries by name:
# `test_dataloader = _base_.kitti_step_dataloader`.
kitti_step_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="VideoSampler"),
    dataset=dict(
        type="KittiStep",
        data_root="data/kitti-step/",
        split="paper_val",  # 'paper_test' for the 12 sequences that the paper reports as its test set
        task="semantic",
        test_mode=True,
        pipeline=[
            dict(type="LoadPicture"),
            dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
            dict(type="LoadKittiStepAnnotations"),
            dict(
                type="PackSegInputs",
                meta_keys=(
                    "img_path",
                    "seg_map_path",
                    "ori_shape",
                    "img_shape",
                    "pad_shape",
                    "scale_factor",
                    "flip",
                    "flip_direction",
                    "reduce_zero_label",
                    "video_id",
                    "frame_id",
                ),
            ),
        ],
    ),
)
kitti_step_evaluator = dict(_delete_=True, type="StreamIoUMetric")
