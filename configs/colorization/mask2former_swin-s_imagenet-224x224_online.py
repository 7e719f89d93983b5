# The jointly trained model adapts to folders of frames while it colours them.
_base_ = ["./mask2former_swin-s_joint-mae_imagenet-224x224.py"]

load_from = None
custom_hooks = [dict(type="OnlineTTTHook", window=16, batch_size=32)]
