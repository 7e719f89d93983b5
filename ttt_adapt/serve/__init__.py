"""A server for the streams of one checkpoint: HTTP in, predictions out. It needs the extra "serve"."""
