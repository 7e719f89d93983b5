"""mmcv's compiled operators: a stand-in where they are missing, and the one that Mask2Former needs."""
