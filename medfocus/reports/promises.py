"""Tables of calibration and of sets of classes for a study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medfocus.reports.controls import CONTROLS
from medfocus.reports.markdown import share
from medfocus.reports.page_content import Sets
from medfocus.reports.rows import StudyRow, percent_text


def calibration_table(block: Sequence[StudyRow]) -> dict[str, Any]:
    """Return ECE without and with temperature, temperature and sets of one test set, as means over draws."""
    rows = [row for row in block if row.focus not in CONTROLS]
    percents = sorted({row.percent_of_train for row in rows})
    of_cell: dict[tuple[str, float], list[StudyRow]] = {}
    for row in rows:
        of_cell.setdefault((row.system, row.percent_of_train), []).append(row)
    return {
        "title": f"{block[0].dataset}, {block[0].test_set} test set",
        "percents": [f"{percent_text(p)} %" for p in percents],
        "systems": [
            {"name": system, "cells": [_cell(of_cell.get((system, p))) for p in percents]}
            for system in dict.fromkeys(row.system for row in rows)
        ],
    }


def _cell(draws: Sequence[StudyRow] | None) -> dict[str, str] | None:
    """Return the texts of a system at one support; None if the study does not have it."""
    if not draws:
        return None
    ece = 100 * _mean(draws, "ece")
    if all(row.temperature == 1 for row in draws):
        return {"ece": f"{ece:.1f}", "temperature": "not calibrated", "sets": ""}
    sets = [row for row in draws if np.isfinite(row.coverage)]
    return {
        "ece": f"{100 * _mean(draws, 'ece_uncalibrated'):.1f} → {ece:.1f}",
        "temperature": f"T {_mean(draws, 'temperature'):.2f}",
        "sets": f"{100 * _mean(sets, 'coverage'):.0f} % in {_mean(sets, 'mean_set_size'):.2f}"
        if sets
        else "no set",
    }


def _mean(rows: Sequence[StudyRow], metric: str) -> float:
    return float(np.mean([getattr(row, metric) for row in rows]))


def sets_table(content: Sets) -> dict[str, Any]:
    """Return coverage and size of a cell's sets, for all test images and for each class.

    Raises ValueError if the sets do not match the classes or the labels.
    """
    title = {"title": f"{content.dataset}: {content.system}", "promise": f"{100 * content.confidence:g} %"}
    if content.sets is None:
        return {**title, "no_set": content.no_set, "lines": []}
    expected = (len(content.labels), len(content.classes))
    if content.sets.shape != expected:
        raise ValueError(f"Sets of {content.dataset}: {content.sets.shape}, not {expected}. Give (N, K).")
    groups = {"all": np.ones(len(content.labels), bool)}
    groups |= {name: content.labels == place for place, name in enumerate(content.classes)}
    lines = [
        {"name": name, "cells": list(set_facts(content.sets[at], content.labels[at]).values())}
        for name, at in groups.items()
    ]
    return {**title, "no_set": "", "lines": lines}


def set_facts(sets: np.ndarray, labels: np.ndarray) -> Mapping[str, str]:
    """Return the texts of coverage and size of sets (N, K) bool with labels (N,); shares have intervals."""
    sizes, covered = sets.sum(axis=1), sets[np.arange(len(labels)), labels]  # (N,), (N,)
    sure = sizes == 1
    return {
        "images": str(len(labels)),
        "coverage": share(covered),
        "mean set size": f"{sizes.mean():.2f}" if len(sizes) else "–",
        "one class": share(sure),
        "right if one class": share(covered[sure]),
    }
