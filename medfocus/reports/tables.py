"""Tables of a study's rows: plain text, Markdown, and the CSV of ``dvc plots``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from medfocus.evaluation.metrics import Interval
from medfocus.reports.controls import control_verdicts
from medfocus.reports.rows import (
    StudyRow,
    blocks_of,
    interval_text,
    intervals_of,
    metric_name,
    paired,
    percent_text,
    signed_text,
)


def plot_table(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """Write the CSV for ``dvc plots``: means over draws in %, by test set, system and percent of train.

    A system that needs no training image has a line at every percent. Raises ValueError if there is no row.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["test_set", "system", "percent_of_train", metric])
    for block in blocks_of(rows):
        intervals = intervals_of(block, metric)
        percents = sorted({row.percent_of_train for row in block} - {0}) or [0.0]
        for system in dict.fromkeys(row.system for row in block):
            for percent in percents:
                interval = intervals.get((system, percent)) or intervals.get((system, 0.0))
                if interval is not None:
                    where = f"{block[0].dataset}, {block[0].test_set}"
                    writer.writerow([where, system, percent_text(percent), f"{interval.mean:.4f}"])
    return buffer.getvalue()


def progress_line(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """Write one line on a system and a test set, to show a study's progress; see ``study_table``."""
    intervals = intervals_of(rows, metric)
    values = (
        f"{percent_text(percent)}%: {interval_text(interval)}" for (_, percent), interval in intervals.items()
    )
    return f"{rows[0].dataset}  {rows[0].system:<28}  {'  '.join(values)}"


def study_table(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """Write a plain-text table for each test set: system x percent of train, mean ± half width in %.

    The half width is that of the 95 % t-interval over draws; a single draw has none. The last lines of a
    table show the ``gain`` of each focus. A ``verdict`` follows for each method with controls in at least two
    draws. Raises ValueError if there is no row.
    """
    blocks = []
    for block in blocks_of(rows):
        cells = _cells(block, metric)
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in cells
        ]
        lines.insert(2, "-" * len(lines[0]))
        table = [_heading(block, metric), "", *(line.rstrip() for line in lines)]
        blocks.append("\n".join([*table, *_paragraphs(control_verdicts(block))]))
    return "\n\n".join(blocks) + "\n"


def markdown_table(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """Write the tables of ``study_table`` in Markdown."""
    blocks = []
    for block in blocks_of(rows):
        head, images, *body = (f"| {' | '.join(line)} |" for line in _cells(block, metric))
        rule = "|---|" + "---:|" * (head.count("|") - 2)
        table = [f"**{_heading(block, metric)}**", "", head, rule, images, *body]
        blocks.append("\n".join([*table, *_paragraphs(control_verdicts(block))]))
    return "\n\n".join(blocks) + "\n"


def gain(rows: Sequence[StudyRow], metric: str, method: str, focus: str, percent: float) -> Interval | None:
    """Return the gain of a focus over the whole image, in percentage points, paired by draw.

    The two cells of a draw have the same support and test images. ``rows`` belong to one test set. Returns
    None if no draw has both cells.
    """
    by_focus: dict[str, dict[int, float]] = {"none": {}, focus: {}}
    for row in rows:
        if row.method == method and row.percent_of_train == percent and row.focus in by_focus:
            by_focus[row.focus][row.seed] = 100 * getattr(row, metric)
    return paired(by_focus[focus], by_focus["none"])


def _heading(block: Sequence[StudyRow], metric: str) -> str:
    intervals = intervals_of(block, metric)
    # At 0 % there is one draw, because nothing is learned.
    draws = {i.draws for (_, percent), i in intervals.items() if percent} or {1}
    first = block[0]
    number = str(max(draws)) if len(draws) == 1 else f"{min(draws)} to {max(draws)}"
    spread = "one draw" if draws == {1} else f"mean ± half width of the 95 % t-interval over {number} draws"
    if draws != {1} and any(row.percent_of_train == 100 for row in block):
        spread += "; at 100 % every draw has the same images"
    where = f"{first.dataset}, {first.test_set} test set ({first.n_test} images)"
    return f"{where}: {metric_name(metric)} in %, {spread}"


def _cells(block: Sequence[StudyRow], metric: str) -> list[list[str]]:
    """Return the lines of a table: percents, numbers of training images, then systems and gains."""
    percents = sorted({row.percent_of_train for row in block})
    intervals = intervals_of(block, metric)
    systems = list(dict.fromkeys(row.system for row in block))
    counts = [sorted({row.n_train for row in block if row.percent_of_train == p}) for p in percents]
    return [
        ["percent of train", *(f"{percent_text(p)}%" for p in percents)],
        ["images", *(str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in counts)],
        *([system, *(interval_text(intervals.get((system, p))) for p in percents)] for system in systems),
        *(
            [f"{method}: {focus} - none", *(_gain(block, metric, method, focus, p) for p in percents)]
            for method, focus in dict.fromkeys((row.method, row.focus) for row in block)
            if focus != "none" and any(row.method == method and row.focus == "none" for row in block)
        ),
    ]


def _gain(block: Sequence[StudyRow], metric: str, method: str, focus: str, percent: float) -> str:
    interval = gain(block, metric, method, focus, percent)
    return interval_text(None) if interval is None else signed_text(interval)


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in ("", line)]
