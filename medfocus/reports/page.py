"""Render a study as one self-contained HTML page.

The page has no script and loads nothing: its styles are inline, its images are data URIs, and its
Content-Security-Policy forbids everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from medfocus.evaluation.comparison import Difference
from medfocus.evaluation.metrics import Interval, mean_interval
from medfocus.images.geometry import BLACK, Frame
from medfocus.images.png import data_url, encode_png
from medfocus.reports import figures
from medfocus.reports.controls import CONTROLS
from medfocus.reports.data_warnings import mask_warnings
from medfocus.reports.page_content import Calibration, Confusion, Cost, Example, PageContent, Recalls
from medfocus.reports.promises import calibration_table, sets_table
from medfocus.reports.rows import StudyRow, blocks_of, intervals_of, percent_text
from medfocus.reports.verdicts import LEVEL, p_value, points, verdict_sentences

_TILE = 256  # pixels a side of an image of the gallery
_TINT = np.array((255, 140, 0), dtype=np.float64)  # orange contrasts with light and dark greys
_SHARES = ("coverage", "chosen", "relaxed", "box", "identity")  # columns of masks.csv that are shares


def render(content: PageContent) -> str:
    """Render the page. Equal content gives equal text, and all text of the content is escaped.

    Raises ValueError if the shape of a confusion matrix, recalls, a mask or an attribution does not match its
    classes or image, or if there are more highlighted systems than colours.
    """
    blocks = blocks_of(content.rows) if content.rows else []
    results = [_results(content, block) for block in blocks]
    highlighted = list(content.highlighted) or _highlighted(content)
    sections = {
        "verdicts": ("Verdict", bool(content.verdicts or results)),
        "accuracy": ("Accuracy over training images", bool(results)),
        "tables": ("Results", bool(results)),
        "gallery": ("Regions and attributions", bool(content.gallery)),
        "confusion": ("Confusion", bool(content.confusions)),
        "calibration": ("Calibration", bool(content.calibrations)),
        "sets": ("Sets of classes", bool(content.sets)),
        "recall": ("Recall by class", bool(content.recalls)),
        "masks": ("Masks", bool(content.masks)),
        "costs": ("Costs", bool(content.costs)),
        "warnings": ("Data warnings", any(content.warnings.values())),
        "reproduce": ("Reproduce", content.provenance is not None),
    }
    return _template().render(
        study=content.study,
        summary=_summary(content),
        schedule=content.schedule,
        sections={name: title for name, (title, filled) in sections.items() if filled},
        verdicts=content.verdicts,
        results=results,
        panels=[_panel(block, highlighted) for block in blocks],
        highlighted=highlighted,
        baseline=content.baseline,
        gallery=[_example(example) for example in content.gallery],
        confusions=[_confusion(confusion) for confusion in content.confusions],
        calibrations=[_calibration(calibration) for calibration in content.calibrations],
        temperatures=[calibration_table(block) for block in blocks if _is_main(block, blocks)],
        sets=[sets_table(sets) for sets in content.sets],
        recalls=[_recalls(recalls) for recalls in content.recalls],
        masks=[_masks(dataset, lines) for dataset, lines in content.masks.items() if lines],
        costs=[_cost(cost) for cost in content.costs],
        warnings={dataset: list(lines) for dataset, lines in content.warnings.items() if lines},
        provenance=content.provenance,
    )


def _summary(content: PageContent) -> list[str]:
    rows = content.rows
    counts = {
        "data set": len({row.dataset for row in rows}),
        "system": len({row.system for row in rows}),
        "draw": len({row.seed for row in rows}),
    }
    facts = [f"{number} {name}{'' if number == 1 else 's'}" for name, number in counts.items() if number]
    return [*facts, f"{content.schedule} schedule"] if content.schedule else facts


def _highlighted(content: PageContent) -> list[str]:
    """Return the baseline and the systems with the highest mean accuracy, without controls."""
    accuracies: dict[str, list[float]] = {}
    for row in content.rows:
        if row.focus not in CONTROLS:
            accuracies.setdefault(row.system, []).append(row.accuracy)
    ranked = sorted(accuracies, key=lambda system: -float(np.mean(accuracies[system])))
    first = [content.baseline] if content.baseline in accuracies else []
    chosen = {*first, *[system for system in ranked if system not in first][: 6 - len(first)]}
    return [system for system in accuracies if system in chosen]


def _results(content: PageContent, block: Sequence[StudyRow]) -> dict[str, Any]:
    """Return the accuracies, differences and sentences of one test set."""
    first, intervals = block[0], intervals_of(block, "accuracy")
    percents = sorted({row.percent_of_train for row in block})
    systems = {row.system: row.focus in CONTROLS for row in block}  # -> whether it is a control
    best = {p: max(i.mean for (_, q), i in intervals.items() if q == p) for p in percents}
    draws = sorted({i.draws for (_, p), i in intervals.items() if p} or {1})
    differences = content.differences.get((first.dataset, first.test_set), {})
    compared = [p for p in percents if any(q == p for _, q in differences)]
    published: dict[str, dict[float, float]] = {}
    for number in content.published:
        if _same(number.dataset, first.dataset):
            published.setdefault(number.method, {})[number.percent_of_train] = number.accuracy_percent
    sizes = [sorted({row.n_train for row in block if row.percent_of_train == p}) for p in percents]
    return {
        "id": _anchor(first.dataset, first.test_set),
        "title": f"{first.dataset}, {first.test_set} test set",
        "images": first.n_test,
        "draws": f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else str(draws[0]),
        "percents": [f"{percent_text(p)} %" for p in percents],
        "sizes": [str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in sizes],
        "systems": [
            {
                "name": system,
                "control": control,
                "baseline": system == content.baseline,
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
        "sentences": verdict_sentences(block, content.baseline, differences),
    }


def _is_main(block: Sequence[StudyRow], blocks: Sequence[Sequence[StudyRow]]) -> bool:
    """Return whether a block is the first, and so the whole, test set of its data set."""
    return next(each for each in blocks if each[0].dataset == block[0].dataset) is block


def _accuracy(interval: Interval | None, best: float) -> dict[str, Any] | None:
    if interval is None:
        return None
    half = "" if math.isnan(interval.half_width) else f"± {interval.half_width:.1f}"
    # All systems with the best rounded mean are marked.
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
        points = sorted((percent, i) for (name, percent), i in intervals.items() if name == system)
        curves.append(
            figures.Curve(
                system,
                tuple(percent for percent, _ in points),
                tuple(i.mean for _, i in points),
                tuple(i.half_width for _, i in points),
            )
        )
    title = f"{block[0].dataset}, {block[0].test_set} test set"
    descriptions = []
    for c in curves:
        if c.system in highlighted:
            points_of = dict(zip(c.percents, c.means, strict=True))
            ends = dict.fromkeys((c.percents[0], c.percents[-1]))
            descriptions.append(f"{c.system} " + ", ".join(f"{points_of[p]:.1f} at {p:.4g} %" for p in ends))
    return {
        "title": title,
        "alt": f"Accuracy in % over the percent of training images, {title}: {'; '.join(descriptions)}.",
        "light": data_url(figures.accuracy_panel(curves, highlighted, figures.LIGHT)),
        "dark": data_url(figures.accuracy_panel(curves, highlighted, figures.DARK)),
    }


def _example(example: Example) -> dict[str, Any]:
    size = example.image.shape[:2]
    tiles = [("image", f"Image {example.name} of {example.dataset}", example.image)]
    if example.mask is not None:
        if example.mask.shape != size:
            raise ValueError(
                f"Example '{example.name}': a mask of {example.mask.shape} on an image of {size} pixels. "
                "Resize the mask to the image's size."
            )
        inside = 0.55 * example.image + 0.45 * _TINT
        region = np.where(example.mask[..., None], inside, 0.6 * example.image)
        share = f"{100 * example.mask.mean():.0f} %"
        tiles.append(
            ("mask", f"The image with its mask in orange, {share} of the area", region.astype(np.uint8))
        )
    if example.focus is not None:
        tiles.append(("focus", "The system's view", example.focus))
    if example.attribution is not None:
        # The geometry of a crop differs from its image's, so its heat is drawn over the view.
        seen = example.image if example.focus is None else example.focus
        fits = example.attribution.shape == seen.shape[:2]
        heat = figures.attribution_overlay(seen if fits else example.image, example.attribution)
        tiles.append(("attribution", "Heat of the attribution", heat))
    return {
        "right": example.true_class == example.predicted,
        "true": example.true_class,
        "predicted": example.predicted,
        "probability": f"{100 * example.probability:.0f} %",
        "inside": None if example.share_inside is None else f"{100 * example.share_inside:.0f} %",
        "where": f"{example.dataset}, {example.system}, {example.name}",
        "tiles": [{"name": name, "alt": alt, "uri": data_url(_tile(tile))} for name, alt, tile in tiles],
    }


def _confusion(confusion: Confusion) -> dict[str, Any]:
    counts, size = confusion.counts, len(confusion.classes)
    if counts.shape != (size, size):
        raise ValueError(
            f"Confusion of {confusion.dataset}: counts are {counts.shape} for {size} classes. Give "
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
        "light": data_url(figures.reliability_panel(curve, figures.LIGHT)),
        "dark": data_url(figures.reliability_panel(curve, figures.DARK)),
    }


def _recalls(recalls: Recalls) -> dict[str, Any]:
    size = len(recalls.classes)
    intervals: dict[str, list[Interval | None]] = {}
    for system, values in recalls.by_system.items():
        if values.ndim != 2 or values.shape[1] != size or len(recalls.counts) != size:
            raise ValueError(
                f"Recalls of {recalls.dataset}: {values.shape} of {system} and {len(recalls.counts)} counts "
                f"for {size} classes. Give (draws, {size}) and {size}."
            )
        intervals[system] = [
            None if np.isnan(v).any() else mean_interval((100 * v).tolist()) for v in values.T
        ]
    best = [
        max((row[k].mean for row in intervals.values() if row[k] is not None), default=0.0)  # type: ignore[union-attr]
        for k in range(size)
    ]
    return {
        "title": f"{recalls.dataset}, {recalls.title}",
        "classes": list(zip(recalls.classes, recalls.counts, strict=True)),
        "systems": [
            {"name": system, "cells": [_accuracy(i, b) for i, b in zip(row, best, strict=True)]}
            for system, row in intervals.items()
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
        "warnings": mask_warnings(lines),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    values = (cost.fit_seconds, cost.images_per_second, cost.peak_mib)
    cells = ["–" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
    return {"name": cost.system, "cells": [*cells, "–" if cost.trainable is None else f"{cost.trainable:,}"]}


def _tile(image: np.ndarray) -> bytes:
    return encode_png(Frame(_TILE, padding=BLACK).image(image))


def _same(a: str, b: str) -> bool:
    """Return whether two names mean one data set: "brain-tumor" is "brain_tumor"."""
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
