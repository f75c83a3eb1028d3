"""Rows of a study -> its table, its CSV and its figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfocus.evaluation.metrics import Interval, mean_interval
from medfocus.reports.figures import COLOURS, MARKERS, blank, png
from medfocus.storage import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = ("--", ":", "-.")
_CONTROLLED = "multiply"  # the focus that the controls take something from
# Control -> what has to be said of a data set where it does not score below the focus.
_FINDINGS = {
    "inverse": "background alone is not significantly below the focus {}: take the data set as confounded",
    "shuffled": "another image's mask is not significantly below the focus {}: "
    "the mask's content is not what helps",
    "center-box": "the centre box is not significantly below the focus {}: no mask had to be found",
}
CONTROLS = tuple(_FINDINGS)


@dataclass(frozen=True)
class StudyRow:
    """What one cell scored on one test set: a line of study.csv. Scores are in [0, 1]."""

    dataset: str
    method: str
    focus: str
    percent_of_train: float
    seed: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auroc: float  # NaN where a class has no test image
    ece: float
    test_set: str  # "official" or "clean"
    n_train: int
    n_test: int
    mlflow_run_id: str

    @property
    def system(self) -> str:
        """The method and, where it has one, its focus: the name of a row of the table."""
        return system_name(self.method, self.focus)


def system_name(method: str, focus: str) -> str:
    """A method and, where it has one, its focus, as tables and the page call them together."""
    return method if focus == "none" else f"{method} ({focus})"


def write_study_csv(rows: Sequence[StudyRow], path: Path) -> None:
    """Write study.csv, one line a row, in the order given; floats with 6 decimals."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(StudyRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        scores = {k: f"{v:.6f}" for k, v in values.items() if isinstance(v, float)}
        writer.writerow({**values, **scores, "percent_of_train": _percent(row.percent_of_train)})
    atomic.write(path, table.getvalue())


def read_study_csv(path: Path) -> list[StudyRow]:
    """Read what ``write_study_csv`` wrote."""
    as_field = {"str": str, "int": int, "float": float}
    types = {f.name: as_field[str(f.type)] for f in fields(StudyRow)}
    with path.open(newline="", encoding="utf-8") as file:
        return [StudyRow(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]


@dataclass(frozen=True)
class Published:
    """A number that others published: shown beside ours, never as ours."""

    dataset: str
    method: str
    percent_of_train: float
    accuracy_percent: float


def read_published(path: Path) -> list[Published]:
    """Read a CSV ``dataset,method,percent_of_train,accuracy_percent``, both numbers in %.

    ``percent`` and ``accuracy`` are taken as shorter names of the last two. Raises ValueError for another
    column or an accuracy that is no percentage.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    longer = {"percent": "percent_of_train", "accuracy": "accuracy_percent"}
    names = [longer.get(name, name) for name in reader.fieldnames or ()]
    wanted = [f.name for f in fields(Published)]
    if sorted(names) != sorted(wanted):
        raise ValueError(f"{path}: its columns are {', '.join(names) or 'none'}; give {','.join(wanted)}.")
    found = []
    for number, line in enumerate(lines, start=2):
        values = dict(zip(names, line.values(), strict=True))
        try:
            percent, accuracy = float(values["percent_of_train"]), float(values["accuracy_percent"])
        except (TypeError, ValueError):
            percent = accuracy = float("nan")
        if not (0 <= percent <= 100 and 0 <= accuracy <= 100):
            raise ValueError(
                f"{path}, line {number}: {percent:g} % of train and an accuracy of {accuracy:g} %; "
                "both are numbers from 0 to 100."
            )
        found.append(Published(values["dataset"], values["method"], percent, accuracy))
    return found


def plot_table(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """The CSV for ``dvc plots``: a line a test set, system and percent of train, means over draws in %.

    What needs no training image has a line at every percent. Raises ValueError when there is no row.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["test_set", "system", "percent_of_train", metric])
    for block in blocks_of(rows):
        intervals = intervals_of(block, metric)
        percents = sorted({row.percent_of_train for row in block} - {0}) or [0.0]
        for system in dict.fromkeys(row.system for row in block):
            for percent in percents:
                found = intervals.get((system, percent)) or intervals.get((system, 0.0))
                if found is not None:
                    where = f"{block[0].dataset}, {block[0].test_set}"
                    writer.writerow([where, system, _percent(percent), f"{found.mean:.4f}"])
    return buffer.getvalue()


def progress_line(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """A system on one test set in one line, as the running table of a study shows it; see ``study_table``."""
    intervals = intervals_of(rows, metric)
    values = (f"{_percent(percent)}%: {_number(interval)}" for (_, percent), interval in intervals.items())
    return f"{rows[0].dataset}  {rows[0].system:<28}  {'  '.join(values)}"


def study_table(rows: Sequence[StudyRow], metric: str = "accuracy") -> str:
    """Plain-text tables, one a data set and test set: system x percent of train, mean ± half width in %.

    The half width is that of the 95 % t-interval over the draws; one draw has none. Below the systems stands
    what each focus adds to its method, paired by draw; see ``gain``. Where controls were run in two draws or
    more, a line a method gives their ``verdict``.
    Raises ValueError when there is no row.
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
    """The tables of ``study_table`` in Markdown."""
    blocks = []
    for block in blocks_of(rows):
        head, images, *body = (f"| {' | '.join(line)} |" for line in _cells(block, metric))
        rule = "|---|" + "---:|" * (head.count("|") - 2)
        table = [f"**{_heading(block, metric)}**", "", head, rule, images, *body]
        blocks.append("\n".join([*table, *_paragraphs(control_verdicts(block))]))
    return "\n\n".join(blocks) + "\n"


def accuracy_figure(rows: Sequence[StudyRow], metric: str = "accuracy") -> bytes:
    """A metric over the percent of train, PNG bytes: a panel a data set and test set, a line a system.

    Bars are 95 % t-intervals over the draws; the systems stand a little apart so that bars can be told
    from each other. A system that needs no training image is a level line.

    Raises ValueError when there is no row.
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
            panel.set_ylabel(f"{_words(metric)} (%)", fontsize=9)
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


def blocks_of(rows: Sequence[StudyRow]) -> list[list[StudyRow]]:
    """Rows by data set and test set, in the order of their first appearance."""
    if not rows:
        raise ValueError("report: the study has no row; evaluate at least one cell.")
    blocks: dict[tuple[str, str], list[StudyRow]] = {}
    for row in rows:
        blocks.setdefault((row.dataset, row.test_set), []).append(row)
    return list(blocks.values())


def _heading(block: Sequence[StudyRow], metric: str) -> str:
    intervals = intervals_of(block, metric)
    # What learns nothing has one draw and says nothing about the others' number.
    draws = {i.draws for (_, percent), i in intervals.items() if percent} or {1}
    first = block[0]
    number = str(max(draws)) if len(draws) == 1 else f"{min(draws)} to {max(draws)}"
    spread = "one draw" if draws == {1} else f"mean ± half width of the 95 % t-interval over {number} draws"
    if draws != {1} and any(row.percent_of_train == 100 for row in block):
        spread += "; at 100 % every draw has the same images"
    where = f"{first.dataset}, {first.test_set} test set ({first.n_test} images)"
    return f"{where}: {_words(metric)} in %, {spread}"


def _cells(block: Sequence[StudyRow], metric: str) -> list[list[str]]:
    """The table as text: the percents, the numbers of training images, then a line a system."""
    percents = sorted({row.percent_of_train for row in block})
    intervals = intervals_of(block, metric)
    systems = list(dict.fromkeys(row.system for row in block))
    counts = [sorted({row.n_train for row in block if row.percent_of_train == p}) for p in percents]
    return [
        ["percent of train", *(f"{_percent(p)}%" for p in percents)],
        ["images", *(str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in counts)],
        *([system, *(_number(intervals.get((system, p))) for p in percents)] for system in systems),
        *(
            [f"{method}: {focus} - none", *(_gain(block, metric, method, focus, p) for p in percents)]
            for method, focus in dict.fromkeys((row.method, row.focus) for row in block)
            if focus != "none" and any(row.method == method and row.focus == "none" for row in block)
        ),
    ]


def gain(rows: Sequence[StudyRow], metric: str, method: str, focus: str, percent: float) -> Interval | None:
    """What a focus adds to a method's metric, in percentage points, paired by draw: each draw's two cells
    have the same support and the same test images. None where no draw has both. ``rows`` are of one test
    set.
    """
    by_focus: dict[str, dict[int, float]] = {"none": {}, focus: {}}
    for row in rows:
        if row.method == method and row.percent_of_train == percent and row.focus in by_focus:
            by_focus[row.focus][row.seed] = 100 * getattr(row, metric)
    return _paired(by_focus[focus], by_focus["none"])


def verdict(
    focus: Mapping[int, float], controls: Mapping[str, Mapping[int, float]], none: Mapping[int, float]
) -> str | None:
    """What the controls say of a focus, in a sentence; None where no control has two draws with it.

    A control counts as below the focus where the 95 % t-interval of its difference, paired by draw, lies
    below 0. The sentence gives the intervals: a wide one says that the draws were too few to tell. It
    knows no chance level; a focus at chance has controls beside it that mean nothing.

    Args:
        focus: Draw -> accuracy in %.
        controls: "inverse", "shuffled", "center-box", those that were run -> draw -> accuracy in %.
        none: Draw -> accuracy in % of the whole image; empty where it was not run.
    """
    paired = ((name, _paired(controls[name], focus)) for name in _FINDINGS if name in controls)
    known = {name: interval for name, interval in paired if interval is not None and interval.draws > 1}
    if not known:
        return None
    found = [
        _FINDINGS[name].format(f"({_signed(interval)})")
        for name, interval in known.items()
        if interval.mean + interval.half_width >= 0
    ]
    if not found:
        below = ", ".join(f"{name} {_signed(interval)}" for name, interval in known.items())
        found = [f"every control is below the focus ({below}): the region carries it"]
    lost = _paired(none, focus)
    if lost is not None and lost.mean - lost.half_width > 0:
        found.append(f"the whole image is above the focus ({_signed(lost)})")
    return "; ".join(found)


def control_verdicts(block: Sequence[StudyRow]) -> list[str]:
    """A line a method that was run with controls: what they say of "multiply", by accuracy.

    Every draw counts once, by its mean over the percents: its supports are nested. At 100 % all draws
    have the same images, at 0 % none, so neither is among them.
    """
    lines = []
    for method in dict.fromkeys(row.method for row in block):
        cells: dict[str, dict[tuple[int, float], float]] = {}  # focus -> (draw, percent) -> accuracy in %
        for row in block:
            concerned = row.method == method and row.focus in (_CONTROLLED, "none", *_FINDINGS)
            if concerned and 0 < row.percent_of_train < 100:
                cells.setdefault(row.focus, {})[row.seed, row.percent_of_train] = 100 * row.accuracy
        common = sorted(set.intersection(*map(set, cells.values()))) if cells else []
        draws = {
            focus: {draw: float(np.mean([at[key] for key in common if key[0] == draw])) for draw, _ in common}
            for focus, at in cells.items()
        }
        controls = {name: of_draw for name, of_draw in draws.items() if name in _FINDINGS}
        said = verdict(draws.get(_CONTROLLED, {}), controls, draws.get("none", {}))
        if said is not None:
            percents = sorted({percent for _, percent in common})
            span = " to ".join(dict.fromkeys(_percent(p) for p in (percents[0], percents[-1])))
            number = len(draws[_CONTROLLED])
            where = f"accuracy at {span} % of train, {number} draws"
            lines.append(f"Controls of {method} ({_CONTROLLED}), {where}: {said}.")
    return lines


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in ("", line)]


def _paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """``ours - others`` over the draws that both have; None where there is none."""
    both = [ours[seed] - other for seed, other in others.items() if seed in ours]
    return mean_interval(both) if both else None


def _gain(block: Sequence[StudyRow], metric: str, method: str, focus: str, percent: float) -> str:
    interval = gain(block, metric, method, focus, percent)
    return _number(None) if interval is None else _signed(interval)


def _signed(interval: Interval) -> str:
    return f"{'' if interval.mean < 0 else '+'}{_number(interval)}"


def intervals_of(block: Sequence[StudyRow], metric: str) -> dict[tuple[str, float], Interval]:
    """Mean and interval in percent of every (system, percent of train)."""
    values: dict[tuple[str, float], list[float]] = {}
    for row in block:
        values.setdefault((row.system, row.percent_of_train), []).append(100 * getattr(row, metric))
    return {key: mean_interval(draws) for key, draws in values.items()}


def _number(interval: Interval | None) -> str:
    if interval is None:
        return "–"  # the sign for no value
    return (
        f"{interval.mean:.1f}" if interval.draws == 1 else f"{interval.mean:.1f} ± {interval.half_width:.1f}"
    )


def _percent(percent: float) -> str:
    return f"{percent:.4g}"


def _words(metric: str) -> str:
    return {"auroc": "AUROC", "ece": "ECE", "macro_f1": "macro F1"}.get(metric, metric.replace("_", " "))


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
    panel.set_ylim(max(low, -1.0), min(high, 101.0))  # an interval of two draws goes far beyond
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.set_xticks(percents, [_percent(p) for p in percents], fontsize=8)
    panel.tick_params(labelsize=8, length=3)
    panel.set_title(title, fontsize=10)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
