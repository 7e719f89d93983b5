"""HDR frames as people see them on an ordinary display: PQ and HLG in BT.2020 colours become BT.709.

PQ is SMPTE ST 2084, HLG is ARIB STD-B67; the formulas and constants of both are those of ITU-R BT.2100, the matrix of
colours is that of BT.2087, and white is at 203 cd/m2 as BT.2408 recommends. What is brighter than 80 % of white is
compressed, the same for all three channels, so that hues stay.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18
"""Their numbers as transfer characteristics in ITU-T H.273."""
WHITE = 203.0
"""cd/m2 of what becomes white."""
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2
_KNEE = 0.8
_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_CODES = 4096


def tone_map(codes: np.ndarray, transfer: int) -> np.ndarray:
    """An HDR picture for an ordinary display.

    Args:
        codes: uint16 RGB [H, W, 3] in BT.2020 colours, 0 to 65535.
        transfer: `PQ` or `HLG`.

    Returns:
        uint8 RGB [H, W, 3] in BT.709 colours, for a display with gamma 2.4.
    """
    light = _linear(transfer)[codes]  # [H, W, 3], 1 = white
    if transfer == HLG:  # the display brightens with the scene: BT.2100's opto-optical transfer
        light *= (_HLG_PEAK / WHITE) * np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** (_HLG_GAMMA - 1)
    light = np.maximum(light @ _TO_BT709.T, 0)
    brightest = light.max(axis=2, keepdims=True)
    above = np.maximum(brightest - _KNEE, 0)
    compressed = np.where(above > 0, _KNEE + above / (1 + above / (1 - _KNEE)), brightest)
    light *= compressed / np.maximum(brightest, 1e-9)
    # The table is over square roots, whose steps in dark parts are about as small as those of the codes.
    return _display()[(np.sqrt(light) * (_CODES - 1) + 0.5).astype(np.uint16)]


@lru_cache(maxsize=2)
def _linear(transfer: int) -> np.ndarray:
    """Light of each code, float32 [65536]: of PQ in units of `WHITE`, of HLG the scene's, 0 to 1."""
    x = np.arange(65536) / 65535
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(x <= 0.5, x**2 / 3, (np.exp((x - c) / a) + b) / 12).astype(np.float32)
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = x ** (1 / m2)
    return (10000 / WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)


@lru_cache(maxsize=1)
def _display() -> np.ndarray:
    """The code of a display with gamma 2.4 for each square root of light, uint8 [4096]."""
    return np.rint(255 * np.linspace(0, 1, _CODES) ** (2 / 2.4)).astype(np.uint8)
