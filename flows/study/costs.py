"""The costs of fits and predictions. They differ between runs, so DVC does not track them."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from medfocus.storage import atomic

Result = TypeVar("Result")


@dataclass(frozen=True)
class FitCost:
    """The cost of one fit; the cache keeps it next to the checkpoint."""

    seconds: float
    peak_mib: float | None  # of the worker during the fit; None if the system does not report it
    learnt: int  # numbers in the checkpoint
    note: str  # of the fitted method; see ``Method.note``


@dataclass(frozen=True)
class CostRow:
    """A line of costs.csv, for one cell."""

    dataset: str
    system: str
    percent_of_train: float
    seed: int
    fit_seconds: float
    peak_mib: float | None
    learnt: int
    images_per_second: float  # predicted by the trained part, from the output of the frozen part
    note: str


def measure(work: Callable[[], Result]) -> tuple[Result, float, float | None]:
    """Call ``work``; return its result, its seconds, and the process's peak memory in MiB during the call.

    Only Linux lets a process reset its peak memory; on other systems the peak is None.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)  # memory that the process has freed and kept is no part of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resettable = True
    except OSError:
        resettable = False
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    if not resettable:
        return result, seconds, None
    status = Path("/proc/self/status").read_text()
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return result, seconds, None if peak is None else int(peak.split()[1]) / 1024


def write(cost: FitCost, checkpoint: Path) -> None:
    """Write a fit's cost next to its checkpoint."""
    atomic.write(checkpoint.with_suffix(".json"), json.dumps(asdict(cost)))


def read(checkpoint: Path) -> FitCost | None:
    """Read a fit's cost; return None if the file is missing or damaged."""
    try:
        return FitCost(**json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # not worth a second fit
        return None


def write_rows(rows: Iterable[CostRow], path: Path) -> None:
    """Write costs.csv."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(CostRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic.write(path, table.getvalue())


def read_rows(path: Path) -> list[CostRow]:
    """Read costs.csv; return no rows if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            CostRow(
                line["dataset"],
                line["system"],
                float(line["percent_of_train"]),
                int(line["seed"]),
                float(line["fit_seconds"]),
                float(line["peak_mib"]) if line["peak_mib"] else None,
                int(line["learnt"]),
                float(line["images_per_second"]),
                line["note"],
            )
            for line in csv.DictReader(file)
        ]
