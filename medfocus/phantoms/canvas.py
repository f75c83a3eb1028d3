"""Draw soft shapes, smooth noise, strokes, outlines and text; the three modalities share these tools.

Arrays are float64. An image spans -1 to 1 in x (to the right) and y (downwards). A scene has its own
coordinates; a ``View`` rotates, scales and shifts them to image coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ :.-/="
ROWS = (  # letters of 3 x 5 pixels: five digits each, one per row of three bits
    "25552" "26227" "61247" "61216" "55711" "74616" "34752" "71244" "25252" "25716"
    "25755" "65656" "34443" "65556" "74647" "74644" "34553" "55755" "72227" "11152" "55655" "44447" "57755"
    "65555" "25552" "65644" "25573" "65655" "34216" "72222" "55557" "55552" "55775" "55255" "55222" "71247"
    "00000" "02020" "00002" "00700" "11244" "07070"
)  # fmt: skip
GLYPHS = {letter: ROWS[5 * k : 5 * k + 5] for k, letter in enumerate(LETTERS)}


@dataclass(frozen=True)
class View:
    """The position of a scene in a square image."""

    size: int  # pixels per side
    turn: float  # radians
    zoom: tuple[float, float]  # image units per scene unit, (x, y)
    shift: tuple[float, float]  # of the origin of the scene, image units

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scene coordinates (x, y) of every pixel, each (size, size)."""
        line = (np.arange(self.size) + 0.5) * (2 / self.size) - 1
        across, down = line[None, :] - self.shift[0], line[:, None] - self.shift[1]
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return (across * cos + down * sin) / self.zoom[0], (down * cos - across * sin) / self.zoom[1]

    def place(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the fractional pixel (column, row) of scene points x, y; the inverse of ``grid``."""
        across, down = x * self.zoom[0], y * self.zoom[1]
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        column = across * cos - down * sin + self.shift[0]
        row = across * sin + down * cos + self.shift[1]
        return (column + 1) * (self.size / 2) - 0.5, (row + 1) * (self.size / 2) - 0.5

    def box(self, centre: tuple[float, float], reach: float) -> tuple[slice, slice]:
        """Return slices that cover all scene points within ``reach`` of ``centre``, with a margin."""
        column, row = self.place(np.array(centre[0]), np.array(centre[1]))
        half = (reach * max(self.zoom) + 0.06) * self.size / 2
        rows = slice(max(int(row - half), 0), max(int(row + half) + 2, 0))
        return rows, slice(max(int(column - half), 0), max(int(column + half) + 2, 0))


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """Return a smooth step from 0 at ``-width`` to 1 at ``+width``."""
    t = distance * (0.5 / width)
    t += 0.5
    t = np.clip(t, 0, 1)
    rise = t * t
    t *= -2
    t += 3
    rise *= t
    return rise


def bump(distance: np.ndarray, width: float) -> np.ndarray:
    """Return a smooth bell, 1 at 0 and 0 beyond ``width``."""
    t = distance * (1 / width)
    t *= t
    np.subtract(1, t, out=t)
    t = np.maximum(t, 0)
    t *= t
    return t


def ellipse(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0
) -> np.ndarray:
    """Return the distance into an ellipse, positive inside; exact at the outline, approximate elsewhere."""
    dx, dy = x - centre[0], y - centre[1]
    if turn:
        cos, sin = np.cos(turn), np.sin(turn)
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return (1 - np.sqrt((dx / radii[0]) ** 2 + (dy / radii[1]) ** 2)) * min(radii)


def rod(
    x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float], radius: float
) -> np.ndarray:
    """Return the distance into a rod with round ends, positive inside."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    ax, ay = x - start[0], y - start[1]
    along = np.clip((ax * dx + ay * dy) / (dx * dx + dy * dy), 0, 1)
    return radius - np.sqrt((ax - along * dx) ** 2 + (ay - along * dy) ** 2)


def ragged(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], lobes: np.ndarray
) -> np.ndarray:
    """Return the relative radius (1 on the outline, less inside) of an ellipse with a wavy outline.

    ``lobes`` is (K,) complex: lobe k adds k + 2 waves around the outline, with its modulus as height and its
    argument as phase.
    """
    dx, dy = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1]
    distance = np.sqrt(dx * dx + dy * dy) + 1e-9
    unit = (dx + 1j * dy) / distance
    radius, power = 1.0, unit
    for lobe in lobes:
        power = power * unit
        radius = radius + (power * lobe).real
    return distance / radius


def lobes(rng: np.random.Generator, heights: tuple[float, ...]) -> np.ndarray:
    """Return the ``lobes`` of ``ragged``, with varied heights (shares of the radius) and random phases."""
    count = len(heights)
    return np.array(heights) * rng.uniform(0.5, 1.2, count) * np.exp(1j * rng.uniform(0, 2 * np.pi, count))


@cache
def _spline(size: int, cells: int) -> np.ndarray:
    """Return cubic B-spline weights (size, cells + 3) from the knots of ``cells`` cells to pixels."""
    at = (np.arange(size) + 0.5) * (cells / size)
    knot = np.floor(at).astype(int)
    t, rows = at - knot, np.arange(size)
    weights = np.zeros((size, cells + 3))
    weights[rows, knot] = (1 - t) ** 3 / 6
    weights[rows, knot + 1] = (3 * t**3 - 6 * t**2 + 4) / 6
    weights[rows, knot + 2] = (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6
    weights[rows, knot + 3] = t**3 / 6
    weights.setflags(write=False)
    return weights


def cloud(rng: np.random.Generator, size: int, down: int, across: int | None = None) -> np.ndarray:
    """Return smooth noise (size, size) of about unit variance with ``down`` x ``across`` cells."""
    across = down if across is None else across
    knots = rng.standard_normal((down + 3, across + 3)) * 2.09  # the spline reduces the deviation to 0.48
    return _spline(size, down) @ knots @ _spline(size, across).T


def blur(image: np.ndarray, down: float, across: float | None = None) -> np.ndarray:
    """Apply a Gaussian blur; deviations in pixels."""
    across = down if across is None else across
    return ndimage.gaussian_filter(image, (down, across), mode="nearest", truncate=2.5)


def dots(view: View, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Draw scene points x, y (N,) as (size, size); each weight spreads over the four nearest pixels."""
    size = view.size
    column, row = view.place(x, y)
    inside = (column >= 0) & (row >= 0) & (column < size - 1) & (row < size - 1)
    column, row, weight = column[inside], row[inside], weights[inside]
    left, top = column.astype(np.intp), row.astype(np.intp)
    fx, fy, corner = column - left, row - top, top * size + left
    right, low = weight * fx, fy * weight
    both = right * fy
    index = np.concatenate((corner, corner + 1, corner + size, corner + size + 1))
    share = np.concatenate((weight - right - low + both, right - both, low - both, both))
    return np.bincount(index, share, size * size).reshape(size, size)


def strokes(view: View, x: np.ndarray, y: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    """Draw lines through scene points x, y (N,) as (size, size) ridges with a deviation of ``width`` pixels.

    ``weights`` (N,) are the height of the ridge at a point times the distance in pixels to the next point.
    Points may be up to two widths apart.
    """
    return blur(dots(view, x, y, weights), width) * (2.5066 * width)


def path(points: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points x, y every ``spacing`` along a Catmull-Rom curve through ``points`` (N, 2)."""
    ends = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    pieces = []
    for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        t = np.arange(0, 1, spacing / max(float(np.hypot(*(c - b))), spacing))[:, None]
        pieces.append(b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    curve = np.concatenate(pieces)
    return curve[:, 0], curve[:, 1]


def lettering(word: str, scale: int) -> np.ndarray:
    """Return ``word``, in letters of GLYPHS, as a (5 * scale, 4 * scale * letters) bool image."""
    rows = [[f"{int(GLYPHS[letter][row]):03b}0" for letter in word] for row in range(5)]
    bits = np.array([[bit == "1" for bit in "".join(row)] for row in rows])
    large = bits.repeat(scale, 0).repeat(scale, 1)
    return large if scale < 3 else blur(large.astype(float), scale / 2.5) > 0.5  # round the corners


def stamp(image: np.ndarray, word: str, corner: tuple[float, float], scale: int, value: float) -> None:
    """Write ``word`` into ``image`` (H, W) in place.

    ``corner`` (x, y) is the top left of the word, in shares of the image. A word that would stick out moves
    inside.
    """
    letters = lettering(word, scale)
    height, width = letters.shape
    left = max(0, min(int(corner[0] * image.shape[1]), image.shape[1] - width))
    top = max(0, min(int(corner[1] * image.shape[0]), image.shape[0] - height))
    part = image[top : top + height, left : left + width]
    part[letters[: part.shape[0], : part.shape[1]]] = value
