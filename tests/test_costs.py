"""Costs of a fit: measured, saved next to its checkpoint, and read back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.study import costs

ROOT = Path(__file__).resolve().parents[1]


MEASURED = """
import time
from flows.study import costs

def hungry():
    block = bytearray(40 * 2**20)  # 40 MiB, with every page written
    time.sleep(0.05)
    del block

_, _, idle = costs.measure(lambda: None)
_, seconds, peak = costs.measure(hungry)
_, _, again = costs.measure(lambda: None)
print(seconds, idle, peak, again)
"""


def test_seconds_and_peak_memory_are_those_of_the_fit_alone() -> None:
    """In its own process, because other processes have free memory from earlier work."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, *peaks = out.stdout.split()
    assert float(seconds) >= 0.05
    if "None" in peaks:
        pytest.skip("this system does not report a process's peak memory")
    idle, peak, again = map(float, peaks)
    assert 30 < peak - idle < 80
    assert again < peak - 20  # the peak was reset


def test_the_cost_of_a_fit_is_saved_next_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ab" / "abc.safetensors"
    assert costs.read(path) is None
    fit = costs.FitCost(1.25, 700.5, 4096, "from scratch")
    costs.write(fit, path)
    assert costs.read(path) == fit


def test_the_table_reads_back_as_written(tmp_path: Path) -> None:
    lines = [
        costs.CostRow("busi", "lp++", 5.0, 0, 0.01, None, 128, 5000.0, ""),
        costs.CostRow("busi", "resnet", 50.0, 1, 20.5, 812.25, 5_000_000, 70.0, "from scratch"),
    ]
    costs.write_rows(lines, tmp_path / "costs.csv")
    assert costs.read_rows(tmp_path / "costs.csv") == lines
    assert costs.read_rows(tmp_path / "none.csv") == []
