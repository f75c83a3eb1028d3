"""Costs: measured around a fit, kept beside its checkpoint, and read back."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from flows import costs


def test_seconds_and_peak_memory_are_those_of_the_work_alone() -> None:
    def hungry() -> None:
        block = np.ones(40 * 2**20 // 8)  # 40 MiB
        time.sleep(0.05)
        del block

    _, idle = costs.measured(lambda: None)
    seconds, peak = costs.measured(hungry)
    assert seconds >= 0.05
    if peak is None or idle is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 30 < peak - idle < 80
    _, again = costs.measured(lambda: None)
    assert again is not None and again < peak - 20  # the peak was set back


def test_a_fit_s_cost_is_kept_beside_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ab" / "abc.safetensors"
    assert costs.read(path) is None
    fit = costs.Fit(1.25, 700.5, 4096, "from scratch")
    costs.write(fit, path)
    assert costs.read(path) == fit


def test_the_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    lines = [
        costs.Line("busi", "lp++", 5.0, 0, 0.01, None, 128, 5000.0, ""),
        costs.Line("busi", "resnet", 50.0, 1, 20.5, 812.25, 5_000_000, 70.0, "from scratch"),
    ]
    costs.write_lines(lines, tmp_path / "costs.csv")
    assert costs.read_lines(tmp_path / "costs.csv") == lines
    assert costs.read_lines(tmp_path / "none.csv") == []
