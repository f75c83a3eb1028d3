"""A study -> one self-contained HTML page: data in, text out; no file and no network.

The page needs no script and loads nothing: its styles are inline, its images are data URIs, and its
Content-Security-Policy forbids everything else. Every part of a ``Report`` may be left out.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from medfocus.evaluation.comparison import CurvePoint, Difference
from medfocus.evaluation.metrics import Interval, Reliability, mean_interval
from medfocus.images.geometry import letterbox
from medfocus.images.png import encode_png
from medfocus.reports import figures
from medfocus.reports.data_warnings import mask_warnings
from medfocus.reports.tables import CONTROLS, Published, StudyRow, blocks_of, intervals_of
from medfocus.reports.verdicts import LEVEL, p_value, points, verdict_sentences

Block = tuple[str, str]  # a data set and one of its test sets

_TILE = 256  # pixels a side of an image of the gallery
_TINT = np.array((255, 140, 0), dtype=np.float64)  # orange shows on grey images, light and dark
_SHARES = ("coverage", "chosen", "relaxed", "box", "identity")  # columns of masks.csv that are shares


@dataclass(frozen=True)
class Example:
    """An image of the gallery and what a fitted system made of it."""

    dataset: str
    system: str
    name: str  # of the image, which names no patient
    image: np.ndarray  # (H, W, 3) uint8
    true_class: str
    predicted: str
    probability: float  # of the predicted class
    mask: np.ndarray | None = None  # (H, W) bool
    focus: np.ndarray | None = None  # (h, w, 3) uint8, what the system looked at
    attribution: np.ndarray | None = None  # (h, w) of the focus, else (H, W); negative values count as 0
    share_inside: float | None = None  # of the attribution, inside the mask


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix."""

    dataset: str
    system: str  # with its percent of train and draw, as the heading shows it
    classes: tuple[str, ...]
    counts: np.ndarray  # (K, K) int, rows the true class, columns the predicted


@dataclass(frozen=True)
class Calibration:
    """A reliability curve; its expected calibration error is shown beside it."""

    dataset: str
    system: str
    curve: Reliability


@dataclass(frozen=True)
class Recalls:
    """The recall of every class, by system."""

    dataset: str
    what: str  # the percent of train and the test set
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # (K,) test images
    by_system: Mapping[str, np.ndarray]  # -> (R, K) in [0, 1], a row a draw; NaN for an absent class


@dataclass(frozen=True)
class Cost:
    """What a system costs; None where it was not measured."""

    system: str
    fit_seconds: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    trainable: int | None = None  # parameters


@dataclass(frozen=True)
class Provenance:
    """How to make the numbers again."""

    command: str
    facts: Mapping[str, str]  # such as git.commit and dvc.lock.sha256
    params: str = ""  # params.yaml, whole


@dataclass(frozen=True)
class Report:
    """Everything a page shows. A part that is left empty has no section."""

    study: str
    rows: Sequence[StudyRow] = ()
    baseline: str = ""  # the system that the differences are to
    differences: Mapping[Block, Mapping[CurvePoint, Difference]] = field(default_factory=dict)
    published: Sequence[Published] = ()
    highlighted: Sequence[str] = ()  # systems in colour in the figure; empty: the baseline and the best
    verdicts: Sequence[str] = ()  # sentences to stand before those that follow from the rows
    gallery: Sequence[Example] = ()
    confusions: Sequence[Confusion] = ()
    calibrations: Sequence[Calibration] = ()
    recalls: Sequence[Recalls] = ()
    masks: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)  # -> lines of masks.csv
    costs: Sequence[Cost] = ()
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # data set -> sentences
    provenance: Provenance | None = None


def render(report: Report) -> str:
    """The page as text; equal reports give equal text. All text of the report is escaped.

    Raises ValueError where shapes do not fit: a confusion matrix and its classes, recalls and their classes,
    an attribution or mask and its image; or for more highlighted systems than there are colours.
    """
    blocks = blocks_of(report.rows) if report.rows else []
    results = [_results(report, block) for block in blocks]
    highlighted = list(report.highlighted) or _highlighted(report)
    sections = {
        "verdicts": ("Verdict", bool(report.verdicts or results)),
        "accuracy": ("Accuracy over training images", bool(results)),
        "tables": ("Results", bool(results)),
        "gallery": ("Regions and attributions", bool(report.gallery)),
        "confusion": ("Confusion", bool(report.confusions)),
        "calibration": ("Calibration", bool(report.calibrations)),
        "recall": ("Recall by class", bool(report.recalls)),
        "masks": ("Masks", bool(report.masks)),
        "costs": ("Costs", bool(report.costs)),
        "warnings": ("Data warnings", any(report.warnings.values())),
        "reproduce": ("Reproduce", report.provenance is not None),
    }
    return _template().render(
        study=report.study,
        summary=_summary(report.rows),
        sections={name: title for name, (title, filled) in sections.items() if filled},
        verdicts=report.verdicts,
        results=results,
        panels=[_panel(block, highlighted) for block in blocks],
        highlighted=highlighted,
        baseline=report.baseline,
        gallery=[_example(example) for example in report.gallery],
        confusions=[_confusion(confusion) for confusion in report.confusions],
        calibrations=[_calibration(calibration) for calibration in report.calibrations],
        recalls=[_recalls(recalls) for recalls in report.recalls],
        masks=[_masks(dataset, lines) for dataset, lines in report.masks.items() if lines],
        costs=[_cost(cost) for cost in report.costs],
        warnings={dataset: list(said) for dataset, said in report.warnings.items() if said},
        provenance=report.provenance,
    )


def _summary(rows: Sequence[StudyRow]) -> list[str]:
    counts = {
        "data set": len({row.dataset for row in rows}),
        "system": len({row.system for row in rows}),
        "draw": len({row.seed for row in rows}),
    }
    return [f"{number} {name}{'' if number == 1 else 's'}" for name, number in counts.items() if number]


def _highlighted(report: Report) -> list[str]:
    """The baseline and the systems with the highest mean accuracy, controls left out."""
    accuracies: dict[str, list[float]] = {}
    for row in report.rows:
        if row.focus not in CONTROLS:
            accuracies.setdefault(row.system, []).append(row.accuracy)
    ranked = sorted(accuracies, key=lambda system: -float(np.mean(accuracies[system])))
    first = [report.baseline] if report.baseline in accuracies else []
    chosen = {*first, *[system for system in ranked if system not in first][: 6 - len(first)]}
    return [system for system in accuracies if system in chosen]


def _results(report: Report, block: Sequence[StudyRow]) -> dict[str, Any]:
    """One test set: the table of accuracies, that of differences, and the sentences."""
    first, intervals = block[0], intervals_of(block, "accuracy")
    percents = sorted({row.percent_of_train for row in block})
    systems = {row.system: row.focus in CONTROLS for row in block}  # -> whether it is a control
    best = {p: max(i.mean for (_, q), i in intervals.items() if q == p) for p in percents}
    draws = sorted({i.draws for (_, p), i in intervals.items() if p} or {1})
    differences = report.differences.get((first.dataset, first.test_set), {})
    compared = [p for p in percents if any(q == p for _, q in differences)]
    published: dict[str, dict[float, float]] = {}
    for number in report.published:
        if _same(number.dataset, first.dataset):
            published.setdefault(number.method, {})[number.percent_of_train] = number.accuracy_percent
    sizes = [sorted({row.n_train for row in block if row.percent_of_train == p}) for p in percents]
    return {
        "id": _anchor(first.dataset, first.test_set),
        "title": f"{first.dataset}, {first.test_set} test set",
        "images": first.n_test,
        "draws": f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else str(draws[0]),
        "percents": [f"{p:.4g} %" for p in percents],
        "sizes": [str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in sizes],
        "systems": [
            {
                "name": system,
                "control": control,
                "baseline": system == report.baseline,
                "cells": [_accuracy(intervals.get((system, p)), best[p]) for p in percents],
            }
            for system, control in systems.items()
        ],
        "published": [
            {"name": name, "cells": [f"{at[p]:.1f}" if p in at else "" for p in percents]}
            for name, at in published.items()
            if any(p in at for p in percents)
        ],
        "compared": [f"{p:.4g} %" for p in compared],
        "differences": [
            {
                "name": system,
                "control": control,
                "baseline": False,
                "cells": [_difference(differences.get((system, p))) for p in compared],
            }
            for system, control in systems.items()
            if any(name == system for name, _ in differences)
        ],
        "said": verdict_sentences(block, report.baseline, differences),
    }


def _accuracy(interval: Interval | None, best: float) -> dict[str, Any] | None:
    if interval is None:
        return None
    half = "" if math.isnan(interval.half_width) else f"± {interval.half_width:.1f}"
    # What reads as the best is shown as the best.
    return {"mean": f"{interval.mean:.1f}", "half": half, "best": f"{interval.mean:.1f}" == f"{best:.1f}"}


def _difference(difference: Difference | None) -> dict[str, str] | None:
    if difference is None:
        return None
    sign = "" if difference.adjusted_p >= LEVEL else "above" if difference.mean > 0 else "below"
    return {
        "mean": points(difference.mean),
        "span": f"{points(difference.low)} to {points(difference.high)}",
        "p": f"p {p_value(difference.adjusted_p)}",
        "sign": sign,
    }


def _panel(block: Sequence[StudyRow], highlighted: Sequence[str]) -> dict[str, str]:
    intervals = intervals_of(block, "accuracy")
    curves = []
    for system in dict.fromkeys(row.system for row in block):
        found = sorted((percent, i) for (name, percent), i in intervals.items() if name == system)
        curves.append(
            figures.Curve(
                system,
                tuple(percent for percent, _ in found),
                tuple(i.mean for _, i in found),
                tuple(i.half_width for _, i in found),
            )
        )
    title = f"{block[0].dataset}, {block[0].test_set} test set"
    told = []
    for c in curves:
        if c.system in highlighted:
            points_of = dict(zip(c.percents, c.means, strict=True))
            ends = dict.fromkeys((c.percents[0], c.percents[-1]))
            told.append(f"{c.system} " + ", ".join(f"{points_of[p]:.1f} at {p:.4g} %" for p in ends))
    return {
        "title": title,
        "alt": f"Accuracy in % over the percent of training images, {title}: {'; '.join(told)}.",
        "light": _uri(figures.accuracy_panel(curves, highlighted, figures.LIGHT)),
        "dark": _uri(figures.accuracy_panel(curves, highlighted, figures.DARK)),
    }


def _example(example: Example) -> dict[str, Any]:
    size = example.image.shape[:2]
    tiles = [("image", f"Image {example.name} of {example.dataset}", example.image)]
    if example.mask is not None:
        if example.mask.shape != size:
            raise ValueError(
                f"Example '{example.name}': a mask of {example.mask.shape} on an image of {size} pixels; "
                "bring it to the image's size."
            )
        inside = 0.55 * example.image + 0.45 * _TINT
        region = np.where(example.mask[..., None], inside, 0.6 * example.image)
        share = f"{100 * example.mask.mean():.0f} %"
        tiles.append(("mask", f"The same with its mask in orange, {share} of it", region.astype(np.uint8)))
    if example.focus is not None:
        tiles.append(("focus", "What the system looks at", example.focus))
    if example.attribution is not None:
        # A crop has another geometry than its image: heat goes where the system looked.
        seen = example.image if example.focus is None else example.focus
        fits = example.attribution.shape == seen.shape[:2]
        heat = figures.attribution_overlay(seen if fits else example.image, example.attribution)
        tiles.append(("attribution", "Heat where the prediction comes from", heat))
    return {
        "right": example.true_class == example.predicted,
        "true": example.true_class,
        "predicted": example.predicted,
        "probability": f"{100 * example.probability:.0f} %",
        "inside": None if example.share_inside is None else f"{100 * example.share_inside:.0f} %",
        "where": f"{example.dataset}, {example.system}, {example.name}",
        "tiles": [{"name": name, "alt": alt, "uri": _uri(_tile(tile))} for name, alt, tile in tiles],
    }


def _confusion(confusion: Confusion) -> dict[str, Any]:
    counts, size = confusion.counts, len(confusion.classes)
    if counts.shape != (size, size):
        raise ValueError(
            f"Confusion of {confusion.dataset}: counts are {counts.shape} for {size} classes; give "
            f"({size}, {size})."
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (K, K)
    return {
        "title": f"{confusion.dataset}: {confusion.system}",
        "classes": confusion.classes,
        "lines": [
            {
                "true": name,
                "cells": [
                    {"share": f"{100 * s:.0f} %", "count": int(n), "heat": f"{0.75 * s:.3f}"}
                    for s, n in zip(shares[i], counts[i], strict=True)
                ],
            }
            for i, name in enumerate(confusion.classes)
        ],
    }


def _calibration(calibration: Calibration) -> dict[str, str]:
    curve = calibration.curve
    title = f"{calibration.dataset}: {calibration.system}"
    return {
        "title": title,
        "ece": f"{100 * curve.ece:.1f} %",
        "alt": f"Reliability curve of {title}: expected calibration error {100 * curve.ece:.1f} %.",
        "light": _uri(figures.reliability_panel(curve, figures.LIGHT)),
        "dark": _uri(figures.reliability_panel(curve, figures.DARK)),
    }


def _recalls(recalls: Recalls) -> dict[str, Any]:
    size = len(recalls.classes)
    intervals: dict[str, list[Interval | None]] = {}
    for system, values in recalls.by_system.items():
        if values.ndim != 2 or values.shape[1] != size or len(recalls.counts) != size:
            raise ValueError(
                f"Recalls of {recalls.dataset}: {values.shape} of {system} and {len(recalls.counts)} counts "
                f"for {size} classes; give (draws, {size}) and {size}."
            )
        intervals[system] = [
            None if np.isnan(v).any() else mean_interval((100 * v).tolist()) for v in values.T
        ]
    best = [
        max((found[k].mean for found in intervals.values() if found[k] is not None), default=0.0)  # type: ignore[union-attr]
        for k in range(size)
    ]
    return {
        "title": f"{recalls.dataset}, {recalls.what}",
        "classes": list(zip(recalls.classes, recalls.counts, strict=True)),
        "systems": [
            {"name": system, "cells": [_accuracy(i, b) for i, b in zip(found, best, strict=True)]}
            for system, found in intervals.items()
        ],
    }


def _masks(dataset: str, lines: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    columns = [name for name in lines[0] if name != "label"]

    def cell(name: str, value: object) -> str:
        if value is None or value == "":
            return "–"
        number = float(str(value))
        if name in _SHARES:
            return f"{100 * number:.0f} %"
        return f"{number:.0f}" if name in ("images", "regions") else f"{number:.2f}"

    return {
        "title": dataset,
        "columns": columns,
        "lines": [
            {"label": line["label"], "cells": [cell(c, line.get(c)) for c in columns]} for line in lines
        ],
        "said": mask_warnings(lines),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    values = (cost.fit_seconds, cost.images_per_second, cost.peak_mib)
    cells = ["–" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
    return {"name": cost.system, "cells": [*cells, "–" if cost.trainable is None else f"{cost.trainable:,}"]}


def _tile(image: np.ndarray) -> bytes:
    return encode_png(letterbox(image, _TILE, (0, 0, 0)), compress_level=9)


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _same(a: str, b: str) -> bool:
    """Whether two names are of one data set: "brain-tumor" is "brain_tumor"."""
    return a.casefold().replace("_", "-") == b.casefold().replace("_", "-")


def _anchor(*words: str) -> str:
    return "-".join("".join(c if c.isalnum() else "-" for c in word.casefold()) for word in words)


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parents[1] / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")
