"""A rendered, labelled street: data to watch and to try the library on, without a download."""

from pathlib import Path

from ttt_adapt.data.street.clip import StreetClip
from ttt_adapt.data.street.scene import CLASSES, IGNORE, PALETTE, StreetScene, street_stills, street_stream
from ttt_adapt.data.street.weather import Weather, drift

__all__ = [
    "CLASSES",
    "IGNORE",
    "PALETTE",
    "WEIGHTS",
    "StreetClip",
    "StreetScene",
    "Weather",
    "drift",
    "street_stills",
    "street_stream",
]

WEIGHTS = Path(__file__).parent / "street.safetensors"
"""A small model that segments such streets, trained on clear days only: see `ttt_adapt.tasks.checkpoint`."""
