"""Online test-time training in MMEngine, mmsegmentation and mmdetection: one wrapper to train, one hook to test."""
