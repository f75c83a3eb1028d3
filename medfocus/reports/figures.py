"""The figures of a study as PNG bytes. The page's figures exist for light and for dark mode."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from medfocus.images.contact_sheet import montage
from medfocus.images.geometry import BLACK, Frame
from medfocus.images.png import encode_png
from medfocus.reports.rows import StudyRow, blocks_of, intervals_of, metric_name, percent_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medfocus.evaluation.metrics import Reliability

# Okabe and Ito's palette, distinct with every common form of colour blindness. Black is first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_LEVELS = ("--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
MOST_HIGHLIGHTED = 7  # systems in colour; all others are grey

_CONTOUR = (255, 140, 0)  # orange contrasts with light and dark greys
_TILE = 176  # pixels a side of a contact sheet's tile
_LABEL_GAP = 0.062  # share of the panel's height between the labels of two lines


@dataclass(frozen=True)
class Ink:
    """The colours of a figure with a transparent background."""

    text: str
    grid: str
    others: str  # lines behind the highlighted lines
    lines: tuple[str, ...]


LIGHT = Ink("#1f2328", "#dfe3e8", "#c4cad1", COLOURS[:MOST_HIGHLIGHTED])
DARK = Ink(
    "#e6e9ed",
    "#343b44",
    "#525b66",
    ("#f4f6f8", "#58b0f0", "#ff8a4a", "#2fc79b", "#e6a0cb", "#f2bb3d", "#9fd8fa"),  # the same hues, lighter
)


@dataclass(frozen=True)
class Curve:
    """A system's accuracy in % over the percent of train. A point at 0 % is drawn as a horizontal line."""

    system: str
    percents: tuple[float, ...]
    means: tuple[float, ...]
    half_widths: tuple[float, ...]  # NaN for a single draw


def blank(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, with the Agg backend and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, *, transparent: bool = False) -> bytes:
    """Encode a figure as PNG without version and time, so that equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, transparent=transparent)
    return buffer.getvalue()


def accuracy_panel(curves: Sequence[Curve], highlighted: Sequence[str], ink: Ink) -> bytes:
    """Draw accuracy over the percent of train on one test set.

    Highlighted systems are in colour, with 95 % intervals over draws and their names at the ends of their
    lines. All others are grey. A system has the same colour in all panels with the same list of highlighted
    systems, even if some of these systems have no curve.

    Raises ValueError if there is no curve, or more highlighted systems than colours.
    """
    if not curves:
        raise ValueError(
            "accuracy_panel: there is no curve to draw. Give the results of at least one system."
        )
    if len(highlighted) > MOST_HIGHLIGHTED:
        raise ValueError(
            f"accuracy_panel: {len(highlighted)} highlighted systems. Give at most {MOST_HIGHLIGHTED}."
        )
    figure = blank(4.9, 3.4)
    panel = figure.subplots()
    percents = sorted({percent for curve in curves for percent in curve.percents} - {0}) or [100.0]
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.set_xticks(percents, [percent_text(percent) for percent in percents])
    panel.set_xlim(percents[0] / 1.25, percents[-1] * 1.25)
    ends: list[tuple[float, str, str]] = []  # end, name and colour of each highlighted line
    for curve in sorted(curves, key=lambda curve: curve.system in highlighted):
        if curve.system not in highlighted:
            _line(panel, curve, ink.others)
            continue
        place = highlighted.index(curve.system)
        apart = 1 + 0.02 * (place - (len(highlighted) - 1) / 2)
        _line(panel, curve, ink.lines[place], MARKERS[place], apart)
        ends.append((curve.means[-1], curve.system, ink.lines[place]))
    _style(panel, ink)
    panel.set_xlabel("training images (%)", fontsize=9, color=ink.text)
    panel.set_ylabel("accuracy (%)", fontsize=9, color=ink.text)
    bottom, top = panel.get_ylim()
    bottom, top = panel.set_ylim(
        max(bottom, -1.0), min(top, 101.0)
    )  # an interval of two draws can be very wide
    heights = spread([(end - bottom) / (top - bottom) for end, _, _ in ends], _LABEL_GAP)
    for (end, name, colour), height in zip(ends, heights, strict=True):
        panel.annotate(
            name,
            (1, (end - bottom) / (top - bottom)),
            (1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
    return png(figure, transparent=True)


def reliability_panel(curve: Reliability, ink: Ink, *, transparent: bool = True) -> bytes:
    """Draw accuracy and its gap to confidence by bin, above the share of predictions by bin."""
    figure = blank(2.9, 3.3)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(curve.count)
    middles = (np.arange(bins) + 0.5) / bins
    filled = curve.count > 0
    at, accuracy, confidence = middles[filled], curve.accuracy[filled], curve.confidence[filled]
    blue, orange = ink.lines[1], ink.lines[2]
    above.bar(at, accuracy, 0.92 / bins, color=blue, label="accuracy")
    above.bar(
        at,
        confidence - accuracy,
        0.92 / bins,
        bottom=accuracy,
        color=orange,
        alpha=0.35,
        label="gap to confidence",
    )
    above.plot([0, 1], [0, 1], color=ink.text, linewidth=0.8, linestyle="--")
    above.set_ylim(0, 1)
    above.set_xlim(0, 1)
    above.set_ylabel("accuracy", fontsize=9, color=ink.text)
    above.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=ink.text, handlelength=1)
    below.bar(middles, curve.count / max(1, curve.count.sum()), 0.92 / bins, color=ink.others)
    below.set_ylabel("share", fontsize=9, color=ink.text)
    below.set_xlabel("confidence", fontsize=9, color=ink.text)
    for panel in (above, below):
        _style(panel, ink)
    return png(figure, transparent=transparent)


def confusion_figure(counts: np.ndarray, classes: Sequence[str], title: str = "") -> bytes:
    """Draw a confusion matrix (K, K): rows are true classes, columns are predicted classes.

    Colours and percentages are shares of the true class, with counts below them.
    Raises ValueError if the shape does not match the classes.
    """
    size = len(classes)
    if counts.shape != (size, size):
        raise ValueError(
            f"confusion_figure: counts are {counts.shape} for {size} classes; give ({size}, {size})."
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K)
    side = 1.6 + 0.75 * max(size, 3)
    figure = blank(side, side)
    panel = figure.subplots()
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(size):
        for j in range(size):
            colour = "white" if shares[i, j] > 0.6 else "black"
            text = f"{100 * shares[i, j]:.0f} %\n{counts[i, j]:d}"
            panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    panel.set_xticks(range(size), classes, fontsize=9, rotation=30, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(size), classes, fontsize=9)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("predicted class", fontsize=9)
    panel.set_ylabel("true class", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10, wrap=True)
    return png(figure)


def mask_sheet(
    images: Sequence[np.ndarray],
    regions: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int = 6,
) -> bytes:
    """Draw a contact sheet of images (H, W, 3) uint8 with the contours of regions (H, W) bool."""
    tiles = []
    for image, region in zip(images, regions, strict=True):
        frame = Frame(_TILE, padding=BLACK)
        tile = frame.image(image)
        inside = Image.fromarray(frame.mask(region) > 0.5).convert("L")
        rim = np.asarray(inside.filter(ImageFilter.MaxFilter(3))) > np.asarray(
            inside.filter(ImageFilter.MinFilter(3))
        )
        tiles.append(np.where(rim[..., None], np.array(_CONTOUR, dtype=np.uint8), tile))
    return encode_png(montage(tiles, columns, captions))


def attribution_overlay(image: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """Draw the heat of an attribution (H, W), without negative values, over a grey image (H, W, 3) uint8.

    The maximum of each attribution scales its heat, so colours of different images are not comparable.
    Raises ValueError if the sizes differ.
    """
    if attribution.shape != image.shape[:2]:
        raise ValueError(
            f"attribution_overlay: {attribution.shape} values on an image of {image.shape[:2]} pixels. "
            "Resize the attribution to the image's size."
        )
    from matplotlib import colormaps

    heat = np.clip(np.nan_to_num(attribution.astype(float)), 0, None)
    heat /= max(float(heat.max()), 1e-12)
    colours = colormaps["inferno"](heat)[..., :3]  # (H, W, 3)
    strength = np.sqrt(heat)[..., None] * 0.75  # makes faint heat visible
    grey = image.mean(axis=2, keepdims=True) / 255
    return np.round(255 * ((1 - strength) * grey + strength * colours)).astype(np.uint8)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights in [0, 1] as little as necessary, so that they are ``gap`` apart, in the same order."""
    order = np.argsort(heights, kind="stable")
    moved = [heights[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    # Move heights above the top down again, together with the heights below them.
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], 1.0 - (len(moved) - 1 - i) * gap)
    placed = [0.0] * len(moved)
    for i, height in zip(order, moved, strict=True):
        placed[i] = height
    return placed


def _line(panel: Axes, curve: Curve, colour: str, marker: str = "", apart: float = 1) -> None:
    """Draw a system's line; with a marker, also its intervals."""
    width = 1.6 if marker else 0.8
    if 0 in curve.percents:
        level = curve.means[curve.percents.index(0)]
        panel.axhline(level, color=colour, linewidth=width, linestyle=(0, (5, 2)), zorder=2 + bool(marker))
    points = [
        point for point in zip(curve.percents, curve.means, curve.half_widths, strict=True) if point[0] > 0
    ]
    if not points:
        return
    x, y, half = map(np.array, zip(*points, strict=True))
    panel.errorbar(
        x * apart,
        y,
        yerr=np.nan_to_num(half) if marker else None,
        color=colour,
        marker=marker or None,
        markersize=4,
        linewidth=width,
        elinewidth=0.8,
        alpha=1 if marker else 0.9,
        zorder=2 + bool(marker),
    )


def _style(panel: Axes, ink: Ink) -> None:
    panel.tick_params(labelsize=8, length=3, color=ink.text, labelcolor=ink.text)
    panel.grid(axis="y", color=ink.grid, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(ink.text)


def accuracy_figure(rows: Sequence[StudyRow], metric: str = "accuracy") -> bytes:
    """Draw a metric over the percent of train, with a panel for each test set and a line for each system.

    Bars are 95 % t-intervals over draws, with small horizontal offsets between systems. A system that needs
    no training image is a horizontal line.

    Raises ValueError if there is no row.
    """
    blocks = blocks_of(rows)
    systems = list(dict.fromkeys(row.system for row in rows))
    columns = min(3, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    width = max(4.6, 3.4 * columns)
    per_line = max(1, min(len(systems), int(width / (0.5 + 0.058 * max(map(len, systems))))))
    figure = blank(width, 2.9 * lines + 0.18 * math.ceil(len(systems) / per_line) + 0.1)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    several = len({block[0].dataset for block in blocks}) < len(blocks)
    for panel, block in zip(panels, blocks, strict=False):
        title = f"{block[0].dataset}, {block[0].test_set} test set" if several else block[0].dataset
        _accuracy_panel(panel, block, systems, metric, title)
    for panel in panels[len(blocks) :]:
        panel.set_axis_off()
    for i, panel in enumerate(panels[: len(blocks)]):
        if i % columns == 0:
            panel.set_ylabel(f"{metric_name(metric)} (%)", fontsize=9)
        if i + columns >= len(blocks):
            panel.set_xlabel("training images (%)", fontsize=9)
            panel.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    for panel in panels[1 : len(blocks)]:
        known |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        [known[s] for s in systems],
        systems,
        loc="outside lower center",
        ncols=per_line,
        fontsize=8,
        frameon=False,
    )
    return png(figure)


def _accuracy_panel(
    panel: Axes, block: Sequence[StudyRow], systems: Sequence[str], metric: str, title: str
) -> None:
    percents = sorted({row.percent_of_train for row in block} - {0})
    intervals = intervals_of(block, metric)
    for i, system in enumerate(systems):
        colour = COLOURS[i % len(COLOURS)]
        if (system, 0) in intervals:
            level = intervals[system, 0].mean
            panel.axhline(
                level, label=system, color=colour, linestyle=_LEVELS[i % len(_LEVELS)], linewidth=1.2
            )
        points = [(p, intervals[system, p]) for p in percents if (system, p) in intervals]
        if not points:
            continue
        apart = 1 + 0.022 * (i - (len(systems) - 1) / 2)
        panel.errorbar(
            [p * apart for p, _ in points],
            [interval.mean for _, interval in points],
            yerr=np.nan_to_num([interval.half_width for _, interval in points]),
            label=system,
            color=colour,
            marker=MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=0,
        )
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, -1.0), min(high, 101.0))  # an interval of two draws can be very wide
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.set_xticks(percents, [percent_text(p) for p in percents], fontsize=8)
    panel.tick_params(labelsize=8, length=3)
    panel.set_title(title, fontsize=10)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
