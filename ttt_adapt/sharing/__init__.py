"""One model, shared by the streams of an adapter."""
