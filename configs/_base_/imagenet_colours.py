# Pictures in ImageNet's folders to learn colours from, and folders of frames to colour. A config that inherits from
# mmseg's uses the entries by name.
colour_root = "data/imagenet/train/"
colour_stream_root = "data/videos/"
colour_train_dataloader = dict(
    _delete_=True,
    batch_size=16,
    num_workers=4,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="ColourPictures",
        data_root=colour_root,
        pipeline=[
            dict(type="LoadPicture"),
            dict(type="Resize", scale=(256, 256), keep_ratio=False),
            dict(type="RandomCrop", crop_size=(224, 224)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackColours"),
        ],
    ),
)
colour_test_pipeline = [
    dict(type="LoadPicture"),
    dict(type="Resize", scale=(448, 256), keep_ratio=False),
    dict(type="PackColours"),
]
colour_test_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=2,
    sampler=dict(type="VideoSampler"),
    dataset=dict(type="ColourPictures", data_root=colour_stream_root, test_mode=True, pipeline=colour_test_pipeline),
)
colour_evaluator = dict(_delete_=True, type="StreamColourMetric")
