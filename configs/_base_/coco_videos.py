# COCO Videos as streams: frames of at most 800 x 1333, one at a time, video after video. A config that inherits from a
# COCO config uses the entries by name: `test_dataloader = _base_.coco_videos_instance_dataloader`.
_load = [
    dict(type="LoadPicture", to_float32=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
]
_meta_keys = (
    "img_id",
    "img_path",
    "ori_shape",
    "img_shape",
    "scale_factor",
    "video_id",
    "frame_id",
    "seg_map_path",
    "instances",
    "segments_info",
)
coco_videos_instance_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="VideoSampler"),
    dataset=dict(
        type="CocoVideos",
        data_root="data/coco-videos/",
        split="val",
        task="instance",
        test_mode=True,
        pipeline=[*_load, dict(type="PackDetInputs", meta_keys=_meta_keys)],
    ),
)
coco_videos_instance_evaluator = dict(_delete_=True, type="StreamAPMetric", metric=["segm", "bbox"])
coco_videos_panoptic_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="VideoSampler"),
    dataset=dict(
        type="CocoVideos",
        data_root="data/coco-videos/",
        split="val",
        task="panoptic",
        test_mode=True,
        pipeline=[*_load, dict(type="PackDetInputs", meta_keys=_meta_keys)],
    ),
)
coco_videos_panoptic_evaluator = [dict(type="StreamPQMetric")]
