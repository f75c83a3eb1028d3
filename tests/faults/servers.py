"""Stop Prefect's and MLflow's servers at the start or in the middle of a main job, for good or for a while.

    python tests/faults/servers.py

The first run is undisturbed. Every fault starts a new project; the job may continue, or exit with 1 and one
line that names the server. Once the server is back, a rerun must not repeat finished work or leave a run
open, and must end with the bytes of the undisturbed run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from flows.servers.mlflow import mlflow_server
from flows.servers.prefect import prefect_server
from flows.servers.processes import HOST, free_port
from tests.faults import forked, state

END = float("inf")
PATIENCE = 3  # retries of MLflow; its default of 7 takes four minutes


def main() -> None:
    """Print a line for each fault and a summary."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="medfocus-servers-"))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(PATIENCE)
    trial = Trial(folder, free_port(), free_port())
    with forked.ready(folder, trial.prefect):
        project = trial.start("undisturbed")
        trial.ends()
        trial.expected = state.outputs(project)
        for fault in (
            trial.prefect_goes,
            trial.prefect_goes_and_comes_back,
            trial.mlflow_is_down_at_the_start,
            trial.mlflow_goes_and_comes_back,
            trial.mlflow_goes,
        ):
            fault()
    shutil.rmtree(folder)
    print(f"5 faults of servers: {trial.failed} failed; {time.monotonic() - began:.0f} s")
    sys.exit(trial.failed > 0)


class Trial:
    """Jobs with one port for Prefect's server and one for MLflow's."""

    def __init__(self, folder: Path, prefect: int, mlflow: int) -> None:
        self.folder, self.prefect, self.mlflow = folder, prefect, mlflow
        self.expected: dict[str, str] = {}
        self.failed = 0

    def start(self, name: str) -> Path:
        """Start a job in a project, which is created if it is missing."""
        self.project = self.folder / name
        if not self.project.exists():
            forked.new_project(self.folder, name)
        (self.folder / "log").unlink(missing_ok=True)
        self.job = forked.start(self.project, self.folder / "log", self.folder / "made")
        return self.project

    def ends(self) -> str:
        """Wait for the job's end and return its last line."""
        self.job.follow(forked.PARTS[0], END)
        return (self.folder / "log").read_text(encoding="utf-8").strip().rpartition("\n")[2]

    def prefect_goes(self) -> None:
        """Stop Prefect's server during training until the rerun."""
        self.start("fault")
        self.job.follow("training", 0.3)
        gone = end("prefect")
        last_line = self.ends()
        with prefect_server(self.prefect):
            self.hold("Prefect's server is killed", gone, last_line, "Prefect's server does not answer")

    def prefect_goes_and_comes_back(self) -> None:
        """Stop Prefect's server during training for some seconds."""
        with prefect_server(self.prefect):
            self.start("fault")
            self.job.follow("training", 0.3)
            gone = end("prefect")
        with prefect_server(self.prefect):
            last_line = self.ends()
            self.hold(
                "Prefect's server is killed and comes back",
                gone,
                last_line,
                "Prefect's server does not answer",
            )

    def mlflow_is_down_at_the_start(self) -> None:
        """Start a job without MLflow's server; it must end before it computes anything."""
        with prefect_server(self.prefect), self.tracking():
            gone = time.monotonic()
            project = self.start("fault")
            last_line = self.ends()
            if (project / ".cache").exists():
                last_line += " (BUT IT HAD STARTED)"
            with mlflow_server(project, self.mlflow):
                self.hold(
                    "MLflow's server is down", gone, last_line, "MLFLOW_TRACKING_URI: no server answers"
                )

    def mlflow_goes_and_comes_back(self) -> None:
        """Stop MLflow's server during the evaluation for some seconds."""
        with prefect_server(self.prefect), self.tracking(), ExitStack() as stack:
            stack.enter_context(mlflow_server(forked.new_project(self.folder, "fault"), self.mlflow))
            project = self.start("fault")
            self.job.follow("evaluate", 0.5)
            gone = end("mlflow")
            stack.enter_context(mlflow_server(project, self.mlflow))
            last_line = self.ends()
            self.hold("MLflow's server is killed and comes back", gone, last_line, "")

    def mlflow_goes(self) -> None:
        """Stop MLflow's server during the evaluation until the rerun."""
        with prefect_server(self.prefect), self.tracking(), ExitStack() as stack:
            stack.enter_context(mlflow_server(forked.new_project(self.folder, "fault"), self.mlflow))
            project = self.start("fault")
            self.job.follow("evaluate", 0.5)
            gone = end("mlflow")
            last_line = self.ends()
            stack.enter_context(mlflow_server(project, self.mlflow))
            self.hold("MLflow's server is killed", gone, last_line, "MLflow's server does not answer")

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Let jobs write their runs to MLflow's server."""
        os.environ["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{self.mlflow}"
        try:
            yield
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]

    def hold(self, name: str, gone: float, last_line: str, server_fault: str) -> None:
        """Run the job again and print the result."""
        code, seconds, project = self.job.code, time.monotonic() - gone, self.project
        kept, bad = state.finished(project), state.damaged(project)
        named = code == 0 or (last_line.startswith("medfocus: ") and server_fault in last_line)
        self.start("fault")
        last = self.ends()
        again = [*(kept.entries & self.job.made()), *(s for s in self.job.ran if s in kept.stages)]
        again += [n for n, stat in kept.cells.items() if state.cells(project).get(n) != stat]
        same = self.job.code == 0 and state.outputs(project) == self.expected
        running = state.left_running(project)
        self.failed += not (named and same) or bool(bad or again or running)
        print(
            f"{name}: ended with {code} after {seconds:.0f} s, {'named' if named else 'NOT NAMED'}, "
            f"{len(bad)} corrupt, {len(again)} lost, {running} runs left running, rerun "
            f"{'byte-identical' if same else f'DIFFERENT: {last}'}\n    {last_line}",
            flush=True,
        )
        shutil.rmtree(project)


def end(server: str) -> float:
    """Kill a server that this process started and return the time."""
    for child in psutil.Process().children():
        if f"{server} server" in " ".join(child.cmdline()):
            tree = [*child.children(recursive=True), child]
            for process in tree:
                process.kill()
            psutil.wait_procs(tree, 10)
    return time.monotonic()


if __name__ == "__main__":
    main()
