"""Move the clock back between two runs of a main job, and while another process holds a run.

    python tests/faults/clock.py

The first run is undisturbed. Then a job is killed in its evaluation and run again with Python's clock some
hours behind. The job must not repeat finished work or leave a run open, and every output must have the
bytes of the undisturbed run. (test_tracking.py tests that no clock takes a run from a living process.)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import forked, state

BACK = (-1, -24, -24 * 400)  # hours


def main() -> None:
    """Print a line for each move and a summary."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="medfocus-clock-"))
    failed = 0
    with forked.ready(folder):
        project = forked.new_project(folder, "undisturbed")
        _ends(forked.start(project, folder / "log", folder / "made"))
        expected = state.outputs(project)
        for hours in BACK:
            project = forked.new_project(folder, "moved")
            job = forked.start(project, folder / "log", folder / "made")
            job.follow("evaluate", 1)
            job.kill()
            kept = state.finished(project)
            job = forked.start(project, folder / "log", folder / "made", hours)
            _ends(job)
            again = [*(kept.entries & job.made()), *(stage for stage in job.ran if stage in kept.stages)]
            again += [name for name, stat in kept.cells.items() if state.cells(project).get(name) != stat]
            same, bad = state.outputs(project) == expected, state.damaged(project)
            running = state.left_running(project)
            failed += not same or bool(again or bad or running)
            print(
                f"clock moved by {hours} hours: {len(bad)} corrupt, {len(again)} lost, {running} runs left "
                f"running, {'byte-identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    shutil.rmtree(folder)
    print(f"{len(BACK)} moves of the clock: {failed} failed; {time.monotonic() - began:.0f} s")
    sys.exit(failed > 0)


def _ends(job: forked.Job) -> None:
    job.follow(forked.PARTS[0], float("inf"))
    if job.code != 0:
        raise RuntimeError(f"the job ended with {job.code}")


if __name__ == "__main__":
    main()
