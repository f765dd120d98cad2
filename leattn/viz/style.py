"""What all pictures are drawn with: colours of nodes, names that are safe to draw and how wide they are."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.font_manager import FontProperties, findfont, get_font

FloatArray = npt.NDArray[np.float64]

MASKED = "#e8e8eb"
INK = "#2b2b33"
FAINT = "#8a8a94"
DPI = 130
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""For every text that holds a name: ``$``, ``_`` and ``\\`` are themselves."""

# Hues of Paul Tol's qualitative schemes, told apart with the common colour deficiencies, neighbours unlike each other.
_DISTINCT = (
    "#4477AA", "#EE7733", "#228833", "#AA3377", "#33BBCC", "#CCAA33", "#882255", "#44AA99", "#CC6677", "#5544AA",
)  # fmt: skip
_SHADES = 32
"""More nodes than distinct hues share this many steps of one ramp, in layout order."""


def node_shades(count: int) -> npt.NDArray[np.int64]:
    """Which colour of :func:`shades` each of ``count`` nodes has, ``[N]``, ascending in layout order."""
    if count <= len(_DISTINCT):
        return np.arange(count)
    return np.arange(count) * min(_SHADES, count) // count


def shades(count: int) -> FloatArray:
    """The colours that ``count`` nodes share, ``[C, 3]`` RGB in 0…1: hues for a few nodes, a ramp for many."""
    if count <= len(_DISTINCT):
        return np.array([matplotlib.colors.to_rgb(name) for name in _DISTINCT[:count]]).reshape(-1, 3)
    ramp = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.82, min(_SHADES, count)))
    return np.asarray(ramp, dtype=np.float64)[:, :3]


def node_colours(count: int) -> FloatArray:
    """The colour of each of ``count`` nodes by layout index, ``[N, 3]`` RGB in 0…1.

    Examples
    --------
    >>> node_colours(3).shape, node_colours(500).shape
    ((3, 3), (500, 3))
    """
    return shades(count)[node_shades(count)]


def lighten(colours: FloatArray, amount: float) -> FloatArray:
    """Mix with white: 0 leaves a colour as it is, 1 makes it white."""
    return colours + (1 - colours) * amount


def drawable(name: str, limit: int = 24) -> str:
    """A name on one line, at most ``limit`` characters long, with a box for what the font cannot draw.

    Examples
    --------
    >>> drawable("two\\nlines"), drawable("a very long name indeed", 10)
    ('two lines', 'a very lo…')
    """
    text = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in name[: 4 * limit]).split()) or "·"
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return text if text.isascii() else "".join(c if _has_glyph(c) else "□" for c in text)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Matplotlib warns at every drawing of a glyph it lacks; the families it falls back on are asked one by one."""
    for family in FontProperties().get_family():
        try:
            file = findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:
            continue
        if get_font(file).get_char_index(ord(character)):
            return True
    return False


def text_width(text: str, size: float) -> float:
    """Width of one line of text in inches, at ``size`` points, but for kerning."""
    return sum(map(_advance, text)) * size / 72


@lru_cache(maxsize=4096)
def _advance(character: str) -> float:
    """How far a character moves the pen, in units of the font's size."""
    font = get_font(findfont(FontProperties()))
    font.set_size(64, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 65536 / 64
