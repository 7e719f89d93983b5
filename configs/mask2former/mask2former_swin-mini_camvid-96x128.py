# A Mask2Former that trains on a CPU: Swin of width 32, 3 decoder layers, from scratch on CamVid's daylight images.
_base_ = ["mmseg::mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024.py", "../_base_/camvid.py"]
custom_imports = dict(imports=["ttt_adapt_openmmlab"], allow_failed_imports=False)

num_classes = 11
model = dict(
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(embed_dims=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], drop_path_rate=0.1, init_cfg=None),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        feat_channels=64,
        out_channels=64,
        num_classes=num_classes,
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
        loss_cls=dict(class_weight=[1.0] * num_classes + [0.1]),
        train_cfg=dict(num_points=2048),
    ),
)

train_dataloader = _base_.camvid_train_dataloader
test_dataloader = _base_.camvid_test_dataloader
test_evaluator = _base_.camvid_evaluator
test_pipeline = _base_.camvid_test_pipeline
val_dataloader = None
val_evaluator = None
val_cfg = None

iterations = 1500
# from scratch the backbone learns as fast as the head
optim_wrapper = dict(
    optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type="PolyLR", eta_min=0, power=0.9, begin=100, end=iterations, by_epoch=False),
]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=iterations)
default_hooks = dict(checkpoint=dict(interval=500, save_best=None, max_keep_ckpts=1))
randomness = dict(seed=0)
