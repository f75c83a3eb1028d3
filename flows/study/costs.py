"""What a fit and a prediction cost: measured beside the results, as no two runs repeat it exactly."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from medfocus.storage import atomic

Done = TypeVar("Done")


@dataclass(frozen=True)
class Fit:
    """The cost of one fit; it stays beside its checkpoint in the cache."""

    seconds: float
    peak_mib: float | None  # of the whole worker while it fitted; None where the system does not tell
    learnt: int  # numbers that the checkpoint keeps
    note: str  # where the weights came from, for a method that says so


@dataclass(frozen=True)
class CostRow:
    """A line of costs.csv: one cell."""

    dataset: str
    system: str
    percent_of_train: float
    seed: int
    fit_seconds: float
    peak_mib: float | None
    learnt: int
    images_per_second: float  # predicted, from what its frozen part made of them
    note: str


def measured(work: Callable[[], Done]) -> tuple[Done, float, float | None]:
    """Do some work: what it gave, its seconds, and the most memory in MiB that the process held during it.

    Linux alone lets a process set its peak back; elsewhere it is None.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resettable = True
    except OSError:
        resettable = False
    began = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - began
    if not resettable:
        return done, seconds, None
    status = Path("/proc/self/status").read_text()
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return done, seconds, None if peak is None else int(peak.split()[1]) / 1024


def write(fit: Fit, checkpoint: Path) -> None:
    """Keep a fit's cost beside its checkpoint."""
    atomic.write(checkpoint.with_suffix(".json"), json.dumps(asdict(fit)))


def read(checkpoint: Path) -> Fit | None:
    """What ``write`` kept; None where nothing was, or it is damaged."""
    try:
        return Fit(**json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # a fit's cost is worth no second fit
        return None


def write_rows(rows: Iterable[CostRow], path: Path) -> None:
    """Write costs.csv."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(CostRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic.write(path, table.getvalue())


def read_rows(path: Path) -> list[CostRow]:
    """Read costs.csv; nothing where it is not."""
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
