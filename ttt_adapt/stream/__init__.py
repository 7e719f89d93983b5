"""One video: its frames, window, weights, optimizer and counters."""
