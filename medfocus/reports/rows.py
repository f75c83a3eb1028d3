"""Rows of a study: the scores of its cells, and numbers that others published; both as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from medfocus.evaluation.metrics import Interval, mean_interval
from medfocus.storage import atomic


@dataclass(frozen=True)
class StudyRow:
    """The scores of one cell on one test set, in [0, 1] unless a comment states otherwise.

    A row of results.csv has the cell's key and no run; a row of study.csv has the run and no key.
    """

    dataset: str
    method: str
    focus: str
    percent_of_train: float
    seed: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    auroc: float  # NaN if a class has no test image
    ece: float  # of the calibrated probabilities
    ece_uncalibrated: float
    temperature: float  # 1: not calibrated
    coverage: float  # share of sets with the true class; NaN without sets
    mean_set_size: float  # in classes; NaN without sets
    test_set: str  # "official" or "clean"
    n_train: int
    n_test: int
    cell_key: str = ""
    mlflow_run_id: str = ""

    @property
    def system(self) -> str:
        """The method and, if it has one, its focus."""
        return system_name(self.method, self.focus)


def system_name(method: str, focus: str) -> str:
    """Return the name of a method with a focus, as the tables and the page show it."""
    return method if focus == "none" else f"{method} ({focus})"


def write_results(rows: Sequence[StudyRow], path: Path) -> None:
    """Write results.csv: one line per row, in the given order, with 4 decimals in scores."""
    _write(rows, path, without="mlflow_run_id")


def write_study(rows: Sequence[StudyRow], path: Path) -> None:
    """Write study.csv: the lines of results.csv, with each cell's MLflow run in place of its key."""
    _write(rows, path, without="cell_key")


def _write(rows: Sequence[StudyRow], path: Path, without: str) -> None:
    table = io.StringIO()
    columns = [field.name for field in fields(StudyRow) if field.name != without]
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        scores = {name: f"{value:.4f}" for name, value in values.items() if isinstance(value, float)}
        writer.writerow({**values, **scores, "percent_of_train": percent_text(row.percent_of_train)})
    atomic.write(path, table.getvalue())


def read_rows(path: Path) -> list[StudyRow]:
    """Read results.csv or study.csv."""
    as_field = {"str": str, "int": int, "float": float}
    types = {f.name: as_field[str(f.type)] for f in fields(StudyRow)}
    with path.open(newline="", encoding="utf-8") as file:
        return [StudyRow(**{k: types[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]


def blocks_of(rows: Sequence[StudyRow]) -> list[list[StudyRow]]:
    """Group rows by data set and test set, in the order of their first appearance.

    Raises ValueError if there is no row.
    """
    if not rows:
        raise ValueError("report: the study has no row; evaluate at least one cell.")
    blocks: dict[tuple[str, str], list[StudyRow]] = {}
    for row in rows:
        blocks.setdefault((row.dataset, row.test_set), []).append(row)
    return list(blocks.values())


def intervals_of(block: Sequence[StudyRow], metric: str) -> dict[tuple[str, float], Interval]:
    """Return the mean and its interval over draws, in percent, by (system, percent of train)."""
    values: dict[tuple[str, float], list[float]] = {}
    for row in block:
        values.setdefault((row.system, row.percent_of_train), []).append(100 * getattr(row, metric))
    return {key: mean_interval(draws) for key, draws in values.items()}


def paired(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Return the interval of ``ours - others`` over their common draws, or None if they have none."""
    both = [ours[seed] - other for seed, other in others.items() if seed in ours]
    return mean_interval(both) if both else None


def interval_text(interval: Interval | None) -> str:
    """Return a mean with its half width, if it has one; a dash for None."""
    if interval is None:
        return "–"
    mean = f"{interval.mean:.1f}"
    return mean if interval.draws == 1 else f"{mean} ± {interval.half_width:.1f}"


def signed_text(interval: Interval) -> str:
    """Return a difference with its half width and its sign."""
    return f"{'' if interval.mean < 0 else '+'}{interval_text(interval)}"


def percent_text(percent: float) -> str:
    """Return a percent of train without trailing zeros."""
    return f"{percent:.4g}"


def metric_name(metric: str) -> str:
    """Return a metric's name for readers."""
    return {"auroc": "AUROC", "ece": "ECE", "macro_f1": "macro F1"}.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Published:
    """A published accuracy, shown next to the study's own and never as its own."""

    dataset: str
    method: str
    percent_of_train: float
    accuracy_percent: float


def read_published(path: Path) -> list[Published]:
    """Read a CSV ``dataset,method,percent_of_train,accuracy_percent``, both numbers in %.

    The last two columns may also be called ``percent`` and ``accuracy``. Raises ValueError for any other
    column, and for a number that is not a percentage.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    longer = {"percent": "percent_of_train", "accuracy": "accuracy_percent"}
    names = [longer.get(name, name) for name in reader.fieldnames or ()]
    wanted = [f.name for f in fields(Published)]
    if sorted(names) != sorted(wanted):
        raise ValueError(f"{path}: its columns are {', '.join(names) or 'none'}; give {','.join(wanted)}.")
    published = []
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
        published.append(Published(values["dataset"], values["method"], percent, accuracy))
    return published
