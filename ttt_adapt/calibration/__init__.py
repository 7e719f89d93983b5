"""Calibrate a model: measure what it is like on its own ground, and choose how it is adapted."""
