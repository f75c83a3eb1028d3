"""Main jobs that start at once and report their progress, forked from a process with all imports.

A job does the work of `python -m flows.pipeline` without the imports and the start of Prefect's server,
which the jobs share. The fits run in the job itself instead of worker processes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.servers.prefect import prefect_server
from flows.servers.processes import free_port

PARTS = ("data", "masks", "features", "training", "evaluate", "page", "registry")
_PART_OF = {name: "data" for name in ("phantoms", "ingest", "duplicates", "splits")} | {
    "finetune": "training"
}


@contextlib.contextmanager
def ready(folder: Path, port: int | None = None) -> Iterator[None]:
    """Import the modules of a main job, start Prefect's server, and create the project ``folder``/template.

    The process must have a single thread, because it forks.
    """
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_HOME": str(folder / "prefect"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        os.environ.pop(name, None)
    with prefect_server(port or free_port()) as api:
        os.environ["PREFECT_API_URL"] = api
        stages = (
            "stages.phantoms",
            "stages.ingest",
            "stages.duplicates",
            "stages.splits",
            "stages.masks",
            "stages.finetune",
            "stages.evaluate",
            "release.page",
            "release.register",
        )
        libraries = ("matplotlib.pyplot", "mlflow.pyfunc", "mlflow.store.db.utils", "open_clip")
        for name in ("flows.pipeline", *(f"flows.{stage}" for stage in stages), *libraries):
            importlib.import_module(name)
        if threading.active_count() != 1:
            raise RuntimeError(f"a library started threads when it was imported: {threading.enumerate()}")
        from tests.conftest import make_project  # imports torch, which reads the environment set above

        (folder / "template").mkdir()
        make_project(folder / "template", segmenter="sam2")
        yield


def new_project(folder: Path, name: str) -> Path:
    """Copy the template to a new project, in place of an earlier project of this name."""
    project = folder / name
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(folder / "template", project, symlinks=True)
    return project


@dataclass
class Job:
    """A running main job."""

    pid: int
    _progress: int  # a pipe with the job's progress
    _made: Path
    seconds: dict[str, float] = field(default_factory=dict)  # so far in each part
    part: str = "start"  # the present part
    ran: list[str] = field(default_factory=list)  # outdated stages, which ran
    code: int | None = None  # exit code, None while it runs

    def follow(self, part: str, seconds: float) -> None:
        """Watch the job until it has spent so many seconds in a part, or has ended."""
        rest, last = b"", time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._progress, selectors.EVENT_READ)
            while self.seconds.get(part, 0.0) < seconds:
                data = os.read(self._progress, 4096) if selector.select(0.002) else None
                now = time.monotonic()
                self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - last
                last = now
                if data == b"":
                    self._wait()
                    return
                *lines, rest = (rest + (data or b"")).split(b"\n")
                for line in lines:
                    word, _, stage = line.decode().partition(" ")
                    if stage:
                        self.ran.append(stage)
                    else:
                        self.part = word

    def kill(self) -> None:
        """Kill the job and all processes that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        self._wait()

    def made(self) -> set[str]:
        """Return the masks and features that the job computed, as "folder key"."""
        return set(self._made.read_text(encoding="utf-8").splitlines()) if self._made.exists() else set()

    def _wait(self) -> None:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._progress)


def start(project: Path, log: Path, made: Path, hours: float = 0) -> Job:
    """Start a main job in a project, with its clock moved by ``hours`` and its output in ``log``."""
    made.unlink(missing_ok=True)
    progress, report = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(report)
        os.setpgid(pid, pid)  # in both processes, because either may be first
        return Job(pid, progress, made)
    code = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(progress)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(project)
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + 3600 * hours
        time.time_ns = lambda: now_ns() + int(3600e9 * hours)
        code = _job(report, os.open(made, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _job(report: int, made: int) -> int:
    """Run the main job in this process and return its exit code."""
    from flows import pipeline
    from flows.release import page, register
    from flows.stages import evaluate, finetune
    from flows.study.dataset import EncodedDataset
    from medfocus.storage.shards import Shards

    def reported(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **settings: Any) -> Any:
            os.write(report, f"{name}\n".encode())
            return function(*arguments, **settings)

        return wrapper

    reproduce, put = pipeline._reproduce, Shards.put

    def stage(study: Any, name: str) -> bool:
        kind = name.partition("@")[0]
        os.write(report, f"{_PART_OF.get(kind, kind)}\n".encode())
        if ran := reproduce(study, name):
            os.write(report, f"ran {name}\n".encode())
        return ran

    def noted_put(self: Shards, entries: Any) -> None:
        entries = list(entries)
        os.write(made, "".join(f"{Path(self._folder).name} {key}\n" for key, _ in entries).encode())
        put(self, entries)

    module: Any
    for module, name, stand_in in (
        (pipeline, "_reproduce", stage),
        (Shards, "put", noted_put),
        (EncodedDataset, "embed", reported("features", EncodedDataset.embed)),
        (finetune, "fit", reported("training", finetune.fit)),
        (finetune, "parallel_config", lambda *_, **__: contextlib.nullcontext()),
        (finetune, "_workers_that_end", contextlib.nullcontext),
        (finetune, "_end_with_parent", lambda: None),
        (evaluate, "_cost_rows", reported("evaluate", evaluate._cost_rows)),
        (page, "write_page", reported("page", page.write_page)),
        (register, "register_best", reported("registry", register.register_best)),
    ):
        setattr(module, name, stand_in)
    try:
        pipeline.main([])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0
