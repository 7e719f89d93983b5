# Panoptic segmentation of 100 COCO images by a Mask2Former that trains on a CPU. It learns nothing
# from so few images. It shows that training, streaming and scoring work on real annotations.
_base_ = ["mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

size = (160, 160)
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=size, pad_mask=True, pad_seg=True)]),
    backbone=dict(embed_dims=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.1, init_cfg=None),
    panoptic_head=dict(
        in_channels=[32, 64, 128, 256],
        feat_channels=64,
        out_channels=64,
        num_queries=20,
        pixel_decoder=dict(
            norm_cfg=dict(type="GN", num_groups=8),
            encoder=dict(
                num_layers=1,
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=64, num_heads=4),
                    ffn_cfg=dict(embed_dims=64, feedforward_channels=128),
                ),
            ),
            positional_encoding=dict(num_feats=32),
        ),
        positional_encoding=dict(num_feats=32),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=64, num_heads=4),
                cross_attn_cfg=dict(embed_dims=64, num_heads=4),
                ffn_cfg=dict(embed_dims=64, feedforward_channels=128),
            ),
        ),
    ),
    train_cfg=dict(num_points=2048),
)

dataset = dict(
    data_root="data/coco100/", ann_file="panoptic.json", data_prefix=dict(_delete_=True, img="images/", seg="panoptic/")
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        pipeline=[
            dict(type="LoadPicture", to_float32=True),
            dict(type="LoadPanopticSegments"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomResize", scale=size, ratio_range=(0.8, 1.6), keep_ratio=True),
            dict(type="RandomCrop", crop_size=size, recompute_bbox=True, allow_negative_crop=True),
            dict(type="PackDetInputs"),
        ],
    ),
)
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_delete_=True, type="VideoSampler"),
    dataset=dict(
        **dataset,
        pipeline=[
            dict(type="LoadPicture", to_float32=True),
            dict(type="Resize", scale=size, keep_ratio=False),  # one size: the images come as one stream
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
        ],
    ),
)
test_evaluator = [dict(type="StreamPQMetric")]
val_dataloader = None
val_evaluator = None
val_cfg = None

iterations = 1000
optim_wrapper = dict(
    optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type="PolyLR", eta_min=0, power=0.9, begin=50, end=iterations, by_epoch=False),
]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations, max_keep_ckpts=1))
randomness = dict(seed=0)
