# CamVid at 96 x 128: daylight clips for training, and two other clips as streams.
camvid_root = "data/camvid/"
camvid_size = (128, 96)  # width, height, as mmcv takes it
camvid_train_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CamVidStream",
        data_root=camvid_root,
        clips=["0006R0_train_a", "0016E5_train_a", "0016E5_train_b", "0016E5_train_d"],
        pipeline=[
            dict(type="LoadPicture"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=camvid_size, ratio_range=(1.0, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(96, 128), cat_max_ratio=0.9),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
camvid_test_pipeline = [  # for an image in a script; the pipeline of the data loader also loads labels
    dict(type="LoadPicture"),
    dict(type="Resize", scale=camvid_size, keep_ratio=False),
    dict(type="PackSegInputs"),
]
camvid_test_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type="VideoSampler"),
    dataset=dict(
        type="CamVidStream",
        data_root=camvid_root,
        clips=["0016E5_val_c", "0001TP_train_a"],
        test_mode=True,
        pipeline=[
            dict(type="LoadPicture"),
            dict(type="Resize", scale=camvid_size, keep_ratio=False),
            dict(type="LoadAnnotations"),
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
camvid_evaluator = dict(_delete_=True, type="StreamIoUMetric")
