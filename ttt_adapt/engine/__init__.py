"""How a step runs: eager, compiled, or recorded as a CUDA graph. The only place that knows of recording."""
