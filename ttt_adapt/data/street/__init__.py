"""A rendered, labelled street: data to watch and to try the library on, without a download."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "street.safetensors"
"""A small model that segments such streets; it was trained on clear days only. `load_checkpoint` reads it."""
