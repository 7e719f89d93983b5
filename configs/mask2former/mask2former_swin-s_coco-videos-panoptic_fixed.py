# COCO Videos, panoptic, arm fixed: the model as trained, without adaptation.
_base_ = ["./mask2former_swin-s_coco-videos-panoptic.py"]

custom_hooks = [dict(type="OnlineTTTHook", arm="fixed")]
