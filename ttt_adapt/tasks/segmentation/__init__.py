"""Semantic segmentation: a class for every pixel, and how that is scored."""
