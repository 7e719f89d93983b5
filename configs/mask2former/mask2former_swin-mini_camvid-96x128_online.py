# The jointly trained small Mask2Former adapts to the streams.
_base_ = ["./mask2former_swin-mini_joint-mae_camvid-96x128.py"]

load_from = None
custom_hooks = [dict(type="OnlineTTTHook", window=16, batch_size=8)]
