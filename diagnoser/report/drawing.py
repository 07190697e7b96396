"""Geometry of the HTML page: scales, ticks, line paths, colour maps and heat maps.

Everything here returns numbers, colours and paths; the page template places them. Curves are drawn
in the unit square stretched by the page, heat maps are indexed PNG images of one pixel a cell, so
that 60 components x 100 steps take kilobytes, not megabytes.
"""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from diagnoser.report.wording import number
from diagnoser.table import Array

Colour = tuple[int, int, int]

# Five points of viridis (van der Walt and Smith 2015) and, for signed values, blue to white to red:
# both are told apart by people with any common colour blindness, and viridis stays ordered in grey.
SEQUENTIAL: Final[tuple[Colour, ...]] = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)
DIVERGING: Final[tuple[Colour, ...]] = (
    (5, 48, 97),
    (67, 147, 195),
    (247, 247, 247),
    (214, 96, 77),
    (103, 0, 31),
)
LEVELS: Final = 64
ZERO, INFINITE, OWN, MISSING = range(LEVELS, LEVELS + 4)  # codes beside the levels
SPECIAL: Final[dict[int, tuple[str, Colour]]] = {
    ZERO: ("exactly zero", (0, 0, 0)),
    INFINITE: ("infinite", (153, 0, 255)),  # furthest from both scales in every kind of vision
    OWN: ("a component with itself", (150, 150, 150)),
    MISSING: ("not measured", (0, 0, 0)),  # transparent: the page's hatching shows through
}

EXTREME: Final = 1e100  # scales end there, and begin at its inverse: nothing over- or underflows
WIDE: Final = 30.0  # a ratio of largest to smallest beyond which a logarithm shows more


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to [0, 1]: ``low`` to 0, ``high`` to 1, evenly or by logarithm.

    ``signed`` is symmetric about zero (0.5) and logarithmic beyond ``unit`` on both sides:
    arcsinh(x / unit), which is linear near zero and needs no case distinction.
    """

    kind: Literal["linear", "logarithmic", "signed"]
    low: float
    high: float
    unit: float = 1.0

    def forward(self, values: Array) -> Array:
        """Returns the places of ``values``, same shape, NaN for NaN and for log of zero or less."""
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high, at = (self._bend(np.asarray(x)) for x in (self.low, self.high, values))
            place = (at - low) / (high - low)
        return np.clip(np.where(np.isneginf(at), np.nan, place), 0.0, 1.0)

    def backward(self, place: float) -> float:
        """Returns the value at ``place`` in [0, 1]."""
        low, high = (float(self._bend(np.asarray(x))) for x in (self.low, self.high))
        at = low + place * (high - low)
        if self.kind == "linear":
            return at
        return float(np.exp(at) if self.kind == "logarithmic" else self.unit * np.sinh(at))

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Returns about ``count`` places with their labels, at round values where possible."""
        if self.kind == "linear":
            return [(_place(self, t), number(t)) for t in _round_steps(self.low, self.high, count)]
        if self.kind == "logarithmic":
            first, last = np.ceil(np.log10(self.low)), np.floor(np.log10(self.high))
            if last - first >= 1:
                stride = max(1, int(np.ceil((last - first) / count)))
                decades = 10.0 ** np.arange(first, last + 1, stride)
                return [(_place(self, float(t)), number(float(t))) for t in decades]
        places = np.linspace(0.0, 1.0, count)
        return [(float(p), number(self.backward(float(p)), digits=2)) for p in places]

    def _bend(self, values: Array) -> Array:
        if self.kind == "logarithmic":
            return np.asarray(np.log(values))
        return values if self.kind == "linear" else np.asarray(np.arcsinh(values / self.unit))


def scale_of(values: Array, signed: bool = False) -> Scale | None:
    """Returns the scale that shows ``values`` best, None where none of them is finite."""
    finite = np.clip(values[np.isfinite(values)], -EXTREME, EXTREME)
    if finite.size == 0:
        return None
    signed = signed or bool((finite < 0).any())
    finite = np.where(np.abs(finite) < 1 / EXTREME, 0.0, finite)
    low, high = float(finite.min()), float(finite.max())
    if signed:
        reach = max(-low, high) or 1.0
        sizes = np.abs(finite[finite != 0])
        typical = float(np.median(sizes)) if sizes.size else reach
        return Scale("signed", -reach, reach, unit=max(typical, reach / 1e4))
    positive = finite[finite > 0]
    if positive.size and high / float(positive.min()) > WIDE:
        return Scale("logarithmic", max(float(positive.min()), high * 1e-12), high)
    size = max(abs(low), abs(high))
    margin = 0.0 if high - low > 1e-9 * size else size or 1.0  # a flat line runs in the middle
    return Scale("linear", low - margin / 2, high + margin / 2)


SCALES: Final = {
    "linear": "linear scale",
    "logarithmic": "logarithmic scale",
    "signed": "logarithmic scale on both sides of zero",
}


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Colours of a matrix: a PNG, what each of its palette's codes means, and the legend.

    ``labels`` name the value of every code, so that values can be read back from the image;
    ``special`` are the codes beside the scale that occur, with their colours.
    """

    rows: int
    columns: int
    image: str
    labels: tuple[str, ...]
    gradient: str
    ticks: tuple[tuple[float, str], ...]
    scale: str
    special: tuple[tuple[str, str], ...]


def heat_map(values: Array, own_diagonal: bool = False) -> HeatMap:
    """Returns the heat map of a (rows, columns) matrix; ``own_diagonal``: row k is column k."""
    values = np.asarray(values, dtype=np.float64)
    seen = values.copy()
    if own_diagonal:
        np.fill_diagonal(seen, np.nan)
    scale = scale_of(seen, signed=own_diagonal)
    if scale is None:  # every number is infinite: nothing to scale
        scale = Scale("linear", 0.0, 1.0)
    place = scale.forward(np.where(np.isfinite(seen), seen, np.nan))
    codes = np.full(values.shape, MISSING, dtype=np.uint8)
    placed = np.isfinite(place)
    codes[placed] = np.minimum(place[placed] * LEVELS, LEVELS - 1).astype(np.uint8)
    codes[~placed & (seen == 0)] = ZERO
    codes[np.isinf(seen)] = INFINITE
    if own_diagonal:
        np.fill_diagonal(codes, OWN)
    anchors = DIVERGING if scale.kind == "signed" else SEQUENTIAL
    middles = [number(scale.backward((level + 0.5) / LEVELS), digits=2) for level in range(LEVELS)]
    present = [code for code in SPECIAL if (codes == code).any()]
    return HeatMap(
        rows=values.shape[0],
        columns=values.shape[1],
        image=_png(codes, [*_colours(anchors), *(colour for _, colour in SPECIAL.values())]),
        labels=(*(f"about {m}" for m in middles), *(name for name, _ in SPECIAL.values())),
        gradient=", ".join(_hex(colour) for colour in anchors),
        ticks=tuple(scale.ticks()),
        scale=SCALES[scale.kind],
        special=tuple(
            (SPECIAL[code][0], "" if code == MISSING else _hex(SPECIAL[code][1]))
            for code in present
        ),
    )


def line_path(
    steps: NDArray[np.int64],
    values: Array,
    scale: Scale,
    *,
    span: tuple[int, int],
    size: tuple[int, int],
    bins: int,
) -> str:
    """Returns an SVG path of a curve with gaps where it is not finite.

    The first and last step of ``span`` are the left and right edge of ``size`` (width, height).
    More than two values a bin are drawn as their smallest and largest, so no spike is lost.
    """
    width, height = size
    start, length = span[0], max(span[1] - span[0], 1)
    edges = np.linspace(0, len(steps), min(bins, len(steps)) + 1).astype(int)
    pieces: list[list[tuple[int, int]]] = [[]]
    for first, last in itertools.pairwise(edges):
        block = scale.forward(values[first:last])
        good = np.flatnonzero(np.isfinite(values[first:last]) & np.isfinite(block))
        if good.size == 0:
            pieces.append([])
            continue
        for i in sorted({int(good[block[good].argmin()]), int(good[block[good].argmax()])}):
            x = round(width * (int(steps[first + i]) - start) / length)
            pieces[-1].append((x, round(height * (1 - float(block[i])))))
    return "".join(_path(piece) for piece in pieces if piece)


def _path(points: Sequence[tuple[int, int]]) -> str:
    """Returns a line through points, after the first in steps from the one before (shorter)."""
    (x, y), *_ = points
    if len(points) == 1:
        return f"M{x} {y}h1"  # a point alone would be invisible
    moves = [f"{d - b} {e - c}" for (b, c), (d, e) in itertools.pairwise(points)]
    return f"M{x} {y}l{' '.join(moves)}"


def step_ticks(span: tuple[int, int], count: int = 6) -> list[tuple[float, str]]:
    """Returns places in [0, 1] and labels for an axis that is even in steps."""
    first, last = float(span[0]), float(span[1])
    if last <= first:
        return [(0.0, str(int(first)))]
    scale = Scale("linear", first, last)
    return [(_place(scale, t), str(int(t))) for t in _round_steps(first, last, count, whole=True)]


def column_ticks(steps: NDArray[np.int64], count: int = 6) -> list[tuple[float, str]]:
    """Returns places in [0, 1] and labels for an axis with one column for each of ``steps``."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).astype(int))
    return [(float((i + 0.5) / len(steps)), str(int(steps[i]))) for i in chosen]


def _place(scale: Scale, value: float) -> float:
    return float(scale.forward(np.asarray(value)))


def _round_steps(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    stride = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    stride = max(stride, 1.0) if whole else stride
    first, last = int(np.ceil(low / stride - 1e-9)), int(np.floor(high / stride + 1e-9))
    return [float(k * stride) for k in range(first, last + 1)]


def _colours(anchors: Sequence[Colour]) -> list[Colour]:
    """Returns `LEVELS` colours, interpolated evenly between the anchors."""
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    channels = [
        np.interp(at, np.arange(len(anchors)), channel) for channel in zip(*anchors, strict=True)
    ]
    return [(round(r), round(g), round(b)) for r, g, b in zip(*channels, strict=True)]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _png(codes: NDArray[np.uint8], palette: Sequence[Colour]) -> str:
    """Returns a data URI of an indexed PNG (PNG specification, W3C 2003, sections 5 and 11)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    rows, columns = codes.shape
    opacity = bytes(0 if code == MISSING else 255 for code in range(len(palette)))
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # filter type 0 before each line
    lines[:, 1:] = codes
    image = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", bytes(itertools.chain.from_iterable(palette)))
        + chunk(b"tRNS", opacity)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
