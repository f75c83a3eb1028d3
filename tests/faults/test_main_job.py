"""Claims about the main job as a user starts it: two jobs at once, and Ctrl-C in every long part."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import make_project
from tests.faults import state

LIMIT = 5.0  # seconds from Ctrl-C to the end, beside other tests; a batch of views is finished first


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with masks by SAM2, so that they take some seconds."""
    folder = tmp_path_factory.mktemp("interrupted")
    make_project(folder, segmenter="sam2")
    return folder


def start(home: Path) -> subprocess.Popen[str]:
    """Start the main job in its own process group, as a terminal does."""
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")},
        "PREFECT_HOME": str(home / ".prefect"),
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=home,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def wait_for(job: subprocess.Popen[str], line: str) -> None:
    """Wait until the job prints a line on its standard error."""
    assert job.stderr is not None
    output = ""
    for printed in job.stderr:
        output += printed
        if line in printed:
            return
    raise AssertionError(f"the job ended before it printed {line!r}: {output}")


def interrupt(job: subprocess.Popen[str]) -> float:
    """Send Ctrl-C to the process group and return the seconds until the job has ended."""
    began = time.monotonic()
    os.killpg(job.pid, signal.SIGINT)
    job.wait(60)
    seconds = time.monotonic() - began
    _, output = job.communicate(timeout=60)
    assert job.returncode == 130
    print(f"ended in {seconds:.1f} s")
    assert "medfocus: interrupted. Finished work is kept." in output
    return seconds


def states(database: Path, query: str) -> set[str]:
    with closing(sqlite3.connect(database)) as opened:
        return {state for (state,) in opened.execute(query)}


def test_the_second_of_two_jobs_is_refused_and_ctrl_c_ends_the_first_in_time(home: Path) -> None:
    both = [start(home), start(home)]
    while all(job.poll() is None for job in both):
        time.sleep(0.05)
    (refused,) = (job for job in both if job.poll() is not None)
    (job,) = (job for job in both if job is not refused)
    assert refused.returncode == 1 and refused.stderr is not None
    assert re.search(
        rf"medfocus: JobRunningError: {home}: another main job is running: process {job.pid} on \S+ since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(.*pipeline.py\)\. Wait until it ends, or stop it; its finished",
        refused.communicate()[1],
    )
    wait_for(job, "splits@phantom-breast: done")
    assert interrupt(job) < LIMIT, "in the masks"
    assert set(state.finished(home).stages) >= {"ingest@phantom-breast", "splits@phantom-breast"}
    assert state.damaged(home) == []

    job = start(home)
    wait_for(job, "masks@phantom-breast: done")
    while not state.cells(home) and job.poll() is None:
        time.sleep(0.05)
    assert interrupt(job) < LIMIT, "in training"
    fitted = state.cells(home)
    assert fitted and state.damaged(home) == []

    job = start(home)
    wait_for(job, "finetune: done")
    assert fitted.items() <= state.cells(home).items(), "no cell is fitted twice"
    while not (home / "mlruns").exists() and job.poll() is None:
        time.sleep(0.05)
    assert interrupt(job) < LIMIT, "in the evaluation"
    assert state.left_running(home) == 0 and state.damaged(home) == []
    assert "KILLED" in states(home / "mlflow.db", "select status from runs")
    prefect = home / ".prefect/prefect.db"
    assert states(prefect, "select state_type from flow_run") == {"CRASHED"}
    assert states(prefect, "select state_type from task_run") <= {"COMPLETED", "CRASHED"}


DROPPED = """
    class Tidied:
        def __del__(self):
            raise KeyboardInterrupt
    del [Tidied()][0]
    time.sleep(60)
"""
WRAPPED = """
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("the server is gone")
"""


@pytest.mark.parametrize("work", [DROPPED, WRAPPED])
def test_ctrl_c_is_not_lost_in_a_finalizer_or_behind_another_error(work: str) -> None:
    """Python drops exceptions of finalizers, and an error in ``finally`` hides a KeyboardInterrupt."""
    code = f"import time\nfrom flows.operations import failures\nwith failures.faults_in_one_line():{work}"
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (job.returncode, job.stderr) == (130, "\nmedfocus: interrupted. Finished work is kept.\n")
