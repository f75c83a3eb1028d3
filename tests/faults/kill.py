"""Kill the main job at random instants and check that nothing is lost, damaged or different.

    python tests/faults/kill.py --instants 100

The first run is undisturbed. Then sequences follow: in a new project, the main job is killed again and
again, each time at a random instant of a random part, and at last runs to its end. After each kill, all
files that a cache, DVC or MLflow names are checked. Finished work must not be repeated, and at the end
every output must have the bytes of the undisturbed run; otherwise the exit code is 1.

`--processes` instants are kills of `python -m flows.pipeline` as a user starts it, with its own server and
worker processes; `forked` describes the other jobs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import forked, state

ENDING = 0.1  # probability that a sequence runs to its end after a kill


@dataclass
class Count:
    """Counts of instants and faults."""

    instants: int = 0
    lost: int = 0
    corrupt: int = 0
    identical: int = 0
    different: int = 0
    running: int = 0  # MLflow's open runs after a sequence
    hit: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        hit = ", ".join(f"{part} {self.hit[part]}" for part in ("start", *forked.PARTS) if self.hit[part])
        return (
            f"{self.instants} instants: {self.lost} lost, {self.corrupt} corrupt, {self.identical} sequences "
            f"byte-identical, {self.different} different, {self.running} runs left running; parts hit: {hit}"
        )

    @property
    def faults(self) -> int:
        """Number of faults of all kinds."""
        return self.lost + self.corrupt + self.different + self.running


def main() -> None:
    """Print a line for each instant and a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instants", type=int, default=100)
    parser.add_argument("--processes", type=int, default=4, help="instants on separate processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="time after which no sequence starts")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a sequence with a fault")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="medfocus-kill-"))
    with forked.ready(folder):
        trial = Trial(folder, random.Random(options.seed), began + 60 * options.minutes)
        print(f"undisturbed: {trial.undisturbed()}", flush=True)
        while trial.count.instants < options.instants - options.processes and trial.in_time():
            trial.sequence(options.instants - options.processes, options.keep)
        while trial.count.instants < options.instants and trial.in_time():
            trial.of_processes(options.instants, options.keep)
    if not (options.keep and trial.count.faults):
        shutil.rmtree(folder)
    print(f"{trial.count}; {time.monotonic() - began:.0f} s")
    sys.exit(trial.count.faults > 0)


class Trial:
    """An undisturbed run, and sequences that are compared with it."""

    def __init__(self, folder: Path, draw: random.Random, end: float) -> None:
        self.folder, self.draw, self.end = folder, draw, end
        self.count = Count()
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def in_time(self) -> bool:
        """Return whether another sequence may start."""
        return time.monotonic() < self.end

    def undisturbed(self) -> str:
        """Run once without a kill and return a line with the seconds of each part."""
        project = self._project("undisturbed")
        job = forked.start(project, self._log(project), self._made(project))
        job.follow(forked.PARTS[0], float("inf"))
        if job.code != 0:
            raise RuntimeError(f"the undisturbed run ended with {job.code}: {self._log(project).read_text()}")
        self.expected, self.seconds = state.outputs(project), job.seconds
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in job.seconds.items())
        return f"{sum(job.seconds.values()):.1f} s ({parts}), {len(self.expected)} outputs"

    def sequence(self, instants: int, keep: bool) -> None:
        """Kill the job of one project until it may end, then compare its outputs with the expected ones."""
        project = self._project("sequence")
        before, first, faults = state.finished(project), 0, self.count.faults
        while True:
            job = forked.start(project, self._log(project), self._made(project))
            rest = forked.PARTS[first : first + 2] if self.count.instants < instants else ()
            part = self.draw.choice(rest or forked.PARTS)
            job.follow(part, self.draw.random() * self.seconds[part] if rest else float("inf"))
            killed = job.code is None
            if killed:
                job.kill()
                done = forked.PARTS.index(part) + (self.draw.random() < 0.5)  # so that the sequence advances
                first = len(forked.PARTS) if self.draw.random() < ENDING else max(first, done)
            before = self._check(project, before, job.made(), job.ran, job.part if killed else "")
            if not killed:
                break
        self._compare(project, job.code or 0)
        if keep and self.count.faults > faults:
            project.rename(self.folder / f"fault-{self.count.instants}")

    def of_processes(self, instants: int, keep: bool) -> None:
        """Do the same with processes as a user starts them, where only the last stage shows the part."""
        project = self._project("process")
        before, faults = state.finished(project), self.count.faults
        delays = [self.draw.uniform(8, 8 + 2 * sum(self.seconds.values())) for _ in range(2)]
        code = 0
        for delay in [*delays[: instants - self.count.instants], None]:
            with self._log(project).open("w") as log:
                job = subprocess.Popen(
                    [sys.executable, "-m", "flows.pipeline"],
                    cwd=project,
                    env={k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
                    | {"PREFECT_HOME": str(project / ".prefect")},
                    stdout=log,
                    stderr=log,
                    process_group=0,
                )
            try:
                job.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            lines = [line.split(": ") for line in self._log(project).read_text().splitlines()]
            ran = [line[0] for line in lines if len(line) == 2 and line[1] == "done"]
            seen = [line[0] for line in lines if len(line) == 2 and line[1] in ("done", "unchanged")]
            self._until_its_workers_end(project)
            code = job.returncode
            at = self._after(seen) if code == -signal.SIGKILL else ""
            before = self._check(project, before, set(), ran, at)
            if not at:
                break
        self._compare(project, code)
        if keep and self.count.faults > faults:
            project.rename(self.folder / f"fault-{self.count.instants}")

    @staticmethod
    def _after(seen: list[str]) -> str:
        """Return the part after the last reported stage."""
        order = ("phantoms", "ingest", "duplicates", "splits", "masks", "finetune", "evaluate")
        parts = ("data", "data", "data", "data", "masks", "training", "evaluate", "registry")
        return parts[order.index(seen[-1].partition("@")[0]) + 1] if seen else "start"

    @staticmethod
    def _until_its_workers_end(project: Path) -> None:
        """Wait for the worker processes, which check once a second whether their job is alive."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            working = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    working += (process / "cwd").resolve().is_relative_to(project)
                except OSError:
                    continue
            if not working:
                return
            time.sleep(0.2)

    def _check(
        self, project: Path, before: state.Finished, made: set[str], ran: list[str], hit: str
    ) -> state.Finished:
        """Count the repeated work and the damaged files; return the finished work."""
        after = state.finished(project)
        again = [*(before.entries & made), *(stage for stage in ran if stage in before.stages)]
        again += [name for name, stat in before.cells.items() if after.cells.get(name) != stat]
        bad = state.damaged(project)
        self.count.lost += len(again)
        self.count.corrupt += len(bad)
        if hit:
            self.count.instants += 1
            self.count.hit[hit] += 1
        print(
            f"{self.count.instants if hit else '-':>4} {'killed in ' + hit if hit else 'ended':20} "
            f"kept: {len(after.stages)} stages, {len(after.entries)} masks and features, "
            f"{len(after.cells)} cells; lost {len(again)}, corrupt {len(bad)}"
            + "".join(f"\n     again: {name}" for name in again[:5])
            + "".join(f"\n     damaged: {name}" for name in bad),
            flush=True,
        )
        return after

    def _compare(self, project: Path, code: int) -> None:
        """Compare a finished sequence with the undisturbed run."""
        if code != 0:
            self.count.different += 1
            print(f"     ended with {code}: {self._log(project).read_text()[-3000:]}", flush=True)
            return
        outputs = state.outputs(project)
        names = sorted({*outputs, *self.expected})
        other = [name for name in names if outputs.get(name) != self.expected.get(name)]
        running = state.left_running(project)
        self.count.running += running
        self.count.different += bool(other)
        self.count.identical += not other
        print(
            f"     {len(outputs)} outputs, {len(other)} differ, {running} left running"
            + "".join(f"\n     other: {name}" for name in other),
            flush=True,
        )

    def _project(self, name: str) -> Path:
        project = forked.new_project(self.folder, name)
        self._log(project).unlink(missing_ok=True)
        return project

    def _log(self, project: Path) -> Path:
        return self.folder / f"{project.name}.log"

    def _made(self, project: Path) -> Path:
        return self.folder / f"{project.name}.made"


if __name__ == "__main__":
    main()
