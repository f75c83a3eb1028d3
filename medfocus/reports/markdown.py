"""Markdown that the model card and the data sheet share: tables, counts and shares with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from medfocus.evaluation import metrics
from medfocus.evaluation.gate import Check


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; a "|" inside a value is escaped."""
    escaped = [[str(value).replace("|", "\\|") for value in row] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in escaped)
    return [first, "|---" * len(head) + "|", *others]


def checks_table(checks: Sequence[Check]) -> list[str]:
    """Return a table of the gate's checks, or nothing if there are none."""
    rows = [
        (check.name, check.value, check.required, "met" if check.passed else "**not met**")
        for check in checks
    ]
    return table(("check", "value", "required", ""), rows) if rows else []


def counted(counts: Counter[str]) -> str:
    """Return "name (count)" for each name, sorted and separated by commas."""
    return ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))


def share(right: np.ndarray) -> str:
    """Return the share of true values, (N,) bool, with its Wilson interval and the counts."""
    return share_of(int(right.sum()), len(right))


def share_of(correct: int, count: int) -> str:
    """Return ``correct`` of ``count`` in percent, with the 95 % Wilson interval and the counts."""
    if not count:
        return "no image"
    low, high = metrics.wilson(correct, count)
    return f"{100 * correct / count:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {correct} of {count}"
