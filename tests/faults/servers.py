"""Take Prefect's and MLflow's servers away from a main job: at the start, in the middle, and for a while.

    python tests/faults/servers.py

One run is left undisturbed. Every fault begins a project anew; the job may go on or end with 1 and one line
that names the server, and once the server is back a rerun has to make nothing again that was finished, to
leave no run open, and to end with the bytes of the undisturbed one.
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

from flows.servers.servers import HOST, free_port, mlflow_server, prefect_server
from tests.faults import forked, whole

END = float("inf")
PATIENCE = 3  # times that MLflow asks again; 7 where nothing is said, which takes it four minutes


def main() -> None:
    """Print a line a fault and a sum at the end."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="medfocus-servers-"))
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(PATIENCE)
    trial = Trial(folder, free_port(), free_port())
    with forked.ready(folder, trial.prefect):
        project = trial.start("undisturbed")
        trial.ends()
        trial.expected = whole.outputs(project)
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
    """Jobs on one port of Prefect's and, where it is asked for, one of MLflow's."""

    def __init__(self, folder: Path, prefect: int, mlflow: int) -> None:
        self.folder, self.prefect, self.mlflow = folder, prefect, mlflow
        self.expected: dict[str, str] = {}
        self.failed = 0

    def start(self, name: str) -> Path:
        """Begin a job in a project that is new, unless it is there."""
        self.project = self.folder / name
        if not self.project.exists():
            forked.new_project(self.folder, name)
        (self.folder / "log").unlink(missing_ok=True)
        self.job = forked.start(self.project, self.folder / "log", self.folder / "made")
        return self.project

    def ends(self) -> str:
        """Let the job end; the last line that it said."""
        self.job.follow(forked.PARTS[0], END)
        return (self.folder / "log").read_text(encoding="utf-8").strip().rpartition("\n")[2]

    def prefect_goes(self) -> None:
        """In the training, and is started again for the rerun."""
        self.start("fault")
        self.job.follow("training", 0.3)
        gone = end("prefect")
        said = self.ends()
        with prefect_server(self.prefect):
            self.hold("Prefect's server is killed", gone, said, "Prefect's server does not answer")

    def prefect_goes_and_comes_back(self) -> None:
        """In the training, for some seconds."""
        with prefect_server(self.prefect):
            self.start("fault")
            self.job.follow("training", 0.3)
            gone = end("prefect")
        with prefect_server(self.prefect):
            said = self.ends()
            self.hold(
                "Prefect's server is killed and comes back", gone, said, "Prefect's server does not answer"
            )

    def mlflow_is_down_at_the_start(self) -> None:
        """The job ends before it computes anything."""
        with prefect_server(self.prefect), self.tracking():
            gone = time.monotonic()
            project = self.start("fault")
            said = self.ends()
            if (project / ".cache").exists():
                said += " (BUT IT HAD BEGUN)"
            with mlflow_server(project, self.mlflow):
                self.hold("MLflow's server is down", gone, said, "MLFLOW_TRACKING_URI: no server answers")

    def mlflow_goes_and_comes_back(self) -> None:
        """In the evaluation, for some seconds."""
        with prefect_server(self.prefect), self.tracking(), ExitStack() as stack:
            stack.enter_context(mlflow_server(forked.new_project(self.folder, "fault"), self.mlflow))
            project = self.start("fault")
            self.job.follow("evaluate", 0.5)
            gone = end("mlflow")
            stack.enter_context(mlflow_server(project, self.mlflow))
            said = self.ends()
            self.hold("MLflow's server is killed and comes back", gone, said, "")

    def mlflow_goes(self) -> None:
        """In the evaluation, and is started again for the rerun."""
        with prefect_server(self.prefect), self.tracking(), ExitStack() as stack:
            stack.enter_context(mlflow_server(forked.new_project(self.folder, "fault"), self.mlflow))
            project = self.start("fault")
            self.job.follow("evaluate", 0.5)
            gone = end("mlflow")
            said = self.ends()
            stack.enter_context(mlflow_server(project, self.mlflow))
            self.hold("MLflow's server is killed", gone, said, "MLflow's server does not answer")

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Have jobs keep their runs on MLflow's server."""
        os.environ["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{self.mlflow}"
        try:
            yield
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]

    def hold(self, name: str, gone: float, said: str, named: str) -> None:
        """Rerun, and say what became of it."""
        code, seconds, project = self.job.code, time.monotonic() - gone, self.project
        kept, bad = whole.finished(project), whole.damaged(project)
        told = code == 0 or (said.startswith("medfocus: ") and named in said)
        self.start("fault")
        last = self.ends()
        again = [*(kept.entries & self.job.made()), *(s for s in self.job.ran if s in kept.stages)]
        again += [n for n, stat in kept.cells.items() if whole.cells(project).get(n) != stat]
        same = self.job.code == 0 and whole.outputs(project) == self.expected
        running = whole.left_running(project)
        self.failed += not (told and same) or bool(bad or again or running)
        print(
            f"{name}: ended with {code} after {seconds:.0f} s, {'named' if told else 'NOT NAMED'}, "
            f"{len(bad)} corrupt, {len(again)} lost, {running} runs left running, rerun "
            f"{'byte-identical' if same else f'DIFFERENT: {last}'}\n    {said}",
            flush=True,
        )
        shutil.rmtree(project)


def end(server: str) -> float:
    """Kill a server that this process started; when."""
    for child in psutil.Process().children():
        if f"{server} server" in " ".join(child.cmdline()):
            tree = [*child.children(recursive=True), child]
            for process in tree:
                process.kill()
            psutil.wait_procs(tree, 10)
    return time.monotonic()


if __name__ == "__main__":
    main()
