"""Write the scores of studies to docs/results/, and print the tables of the pages.

    python -m benchmarks.results . studies/busi

Each argument is the folder of a study that has run. Its data sets replace their rows in accuracy.csv,
differences.csv and controls.csv; other data sets keep theirs. Rows of MedFocusCLIP's own head are left out.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from medfocus.evaluation.metrics import Interval
from medfocus.reports.controls import CONTROLLED, accuracies
from medfocus.reports.rows import (
    StudyRow,
    blocks_of,
    interval_text,
    intervals_of,
    paired,
    percent_text,
    read_rows,
    signed_text,
    system_name,
)
from medfocus.reports.tables import gain

FOLDER = Path("docs/results")
COLUMNS = {
    "accuracy": (
        *("dataset", "test_set", "test_images", "method", "focus", "percent_of_train", "train_images"),
        *("accuracy", "half_width", "draws"),
    ),
    "differences": (
        *("dataset", "test_set", "method", "focus", "against", "percent_of_train"),
        *("difference", "half_width", "draws"),
    ),
    "controls": (
        *("dataset", "test_set", "method", "focus", "control", "percents"),
        *("difference", "half_width", "draws"),
    ),
}
SHOWN = (  # rows of the pages' tables
    *("pixels", "pixels-svm", "clip-zero-shot", "clip-zero-shot (crop)", "clip-linear-probe"),
    *("tip-adapter", "lp++", "medfocusclip", "medfocusclip (multiply)", "medfocusclip (crop)"),
    *("medfocusclip (dual-crop)", "medfocusclip (inverse)", "medfocusclip (shuffled)"),
    *("medfocusclip (shuffled-crop)", "medfocusclip-full", "medfocusclip-full (dual-crop)"),
)

Line = tuple[str, ...]


def main() -> None:
    """Read the studies, replace their data sets' rows, and print a table for each data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies that have run")
    folders: list[Path] = parser.parse_args().studies
    rows = [row for folder in folders for row in read_rows(folder / "reports" / "study.csv")]
    blocks = blocks_of([row for row in rows if not row.method.endswith("-head")])
    names = list(dict.fromkeys(block[0].dataset for block in blocks))
    for table, lines_of in (("accuracy", accuracy), ("differences", differences), ("controls", controls)):
        replace(table, names, [line for block in blocks for line in lines_of(block)])
    shown: dict[str, Sequence[StudyRow]] = {}
    for block in blocks:  # the official test set comes first, where there is one
        shown.setdefault(block[0].dataset, block)
    for name, block in shown.items():
        print(f"### {name}, {block[0].test_set} test set ({block[0].n_test} images)\n\n{page_table(block)}\n")


def accuracy(block: Sequence[StudyRow]) -> Iterator[Line]:
    """Yield the accuracy of each system at each percent."""
    intervals, first = intervals_of(block, "accuracy"), block[0]
    sizes: dict[tuple[str, str, float], int] = {}  # of the first draw
    for row in block:
        sizes.setdefault((row.method, row.focus, row.percent_of_train), row.n_train)
    for (method, focus, percent), size in sizes.items():
        interval = intervals[system_name(method, focus), percent]
        place = (first.dataset, first.test_set, str(first.n_test), method, focus)
        yield (*place, percent_text(percent), str(size), f"{interval.mean:.1f}", *_spread(interval))


def differences(block: Sequence[StudyRow]) -> Iterator[Line]:
    """Yield the gain of each focus over the whole image at each percent."""
    cells = dict.fromkeys((row.method, row.focus, row.percent_of_train) for row in block)
    for method, focus, percent in cells:
        interval = gain(block, "accuracy", method, focus, percent) if focus != "none" else None
        if interval is not None:
            place = (block[0].dataset, block[0].test_set, method, focus, "none")
            yield (*place, percent_text(percent), _signed(interval), *_spread(interval))


def controls(block: Sequence[StudyRow]) -> Iterator[Line]:
    """Yield each control of a focus, and the whole image, minus the focus."""
    for method in dict.fromkeys(row.method for row in block):
        for focus, names in CONTROLLED.items():
            draws, percents = accuracies(block, method, focus)
            if focus not in draws or not any(name in draws for name in names):
                continue
            span = "-".join(percent_text(percent) for percent in (percents[0], percents[-1]))
            for name in (*names, "none"):
                interval = paired(draws.get(name, {}), draws[focus])
                if interval is not None:
                    place = (block[0].dataset, block[0].test_set, method, focus, name)
                    yield (*place, span, _signed(interval), *_spread(interval))


def replace(table: str, names: Sequence[str], lines: Sequence[Line]) -> None:
    """Put ``lines`` in the place of the rows of the data sets ``names``."""
    path = FOLDER / f"{table}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        kept = [tuple(line) for line in csv.reader(file)][1:]
    kept = [line for line in kept if line[0] not in names]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS[table], *kept, *lines])


def page_table(block: Sequence[StudyRow]) -> str:
    """Return the table of a data set in Markdown, with the rows SHOWN."""
    percents = sorted({row.percent_of_train for row in block})
    intervals = intervals_of(block, "accuracy")
    sizes = {row.percent_of_train: row.n_train for row in reversed(block)}
    head = ["percent of train", *(f"{percent_text(percent)} %" for percent in percents)]
    lines = [
        ["training images", *(str(sizes[percent]) for percent in percents)],
        *(
            [name, *(interval_text(intervals.get((name, percent))) for percent in percents)]
            for name in SHOWN
            if any((name, percent) in intervals for percent in percents)
        ),
    ]
    first, *others = (f"| {' | '.join(cells)} |" for cells in [head, *lines])
    return "\n".join([first, f"|---|{'---:|' * len(percents)}", *others])


def _signed(interval: Interval) -> str:
    return signed_text(interval).partition(" ")[0]


def _spread(interval: Interval) -> Line:
    half_width = "" if interval.draws == 1 else f"{interval.half_width:.1f}"
    return half_width, str(interval.draws)


if __name__ == "__main__":
    main()
