"""Claims about the main job as a user starts it: two at once, and Ctrl-C in every long part of it."""

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
from tests.faults import whole

LIMIT = 5.0  # seconds from Ctrl-C to the end


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One project, its masks by SAM2, so that they take a while."""
    folder = tmp_path_factory.mktemp("interrupted")
    make_project(folder, segmenter="sam2")
    return folder


def start(home: Path) -> subprocess.Popen[str]:
    """The main job, in a process group of its own, as a terminal starts it."""
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
    """Until the job says a line on its standard error."""
    assert job.stderr is not None
    said = ""
    for heard in job.stderr:
        said += heard
        if line in heard:
            return
    raise AssertionError(f"the job ended before it said {line!r}: {said}")


def interrupt(job: subprocess.Popen[str]) -> float:
    """Ctrl-C, which reaches the whole group; the seconds until the job has ended."""
    began = time.monotonic()
    os.killpg(job.pid, signal.SIGINT)
    job.wait(60)
    seconds = time.monotonic() - began
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130
    print(f"ended in {seconds:.1f} s")
    assert "medfocus: interrupted. What was finished is kept." in said
    return seconds


def states(database: Path, query: str) -> set[str]:
    with closing(sqlite3.connect(database)) as opened:
        return {state for (state,) in opened.execute(query)}


def test_of_two_jobs_at_once_one_is_refused_and_ctrl_c_ends_the_other_in_time(home: Path) -> None:
    both = [start(home), start(home)]
    while all(job.poll() is None for job in both):
        time.sleep(0.05)
    (refused,) = (job for job in both if job.poll() is not None)
    (job,) = (job for job in both if job is not refused)
    assert refused.returncode == 1 and refused.stderr is not None
    assert re.search(
        rf"medfocus: JobRunningError: {home}: another main job runs here, process {job.pid} on \S+ since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(.*pipeline.py\)\. Wait for it, or end it: what it has finished is",
        refused.communicate()[1],
    )
    wait_for(job, "splits@phantom-breast: done")
    assert interrupt(job) < LIMIT, "in the masks"
    assert set(whole.finished(home).stages) >= {"ingest@phantom-breast", "splits@phantom-breast"}
    assert whole.damaged(home) == []

    job = start(home)
    wait_for(job, "masks@phantom-breast: done")
    while not whole.cells(home) and job.poll() is None:
        time.sleep(0.05)
    assert interrupt(job) < LIMIT, "in training"
    fitted = whole.cells(home)
    assert fitted and whole.damaged(home) == []

    job = start(home)
    wait_for(job, "finetune: done")
    assert fitted.items() <= whole.cells(home).items(), "no cell is fitted twice"
    while not (home / "mlruns").exists() and job.poll() is None:
        time.sleep(0.05)
    assert interrupt(job) < LIMIT, "in the evaluation"
    assert whole.left_running(home) == 0 and whole.damaged(home) == []
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
def test_ctrl_c_is_not_lost_in_what_tidies_up(work: str) -> None:
    """What is raised while Python frees memory is only reported; an error of tidying up takes its place."""
    code = (
        f"import time\nfrom flows.operations.jobs import faults_in_one_line\nwith faults_in_one_line():{work}"
    )
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (job.returncode, job.stderr) == (130, "\nmedfocus: interrupted. What was finished is kept.\n")
