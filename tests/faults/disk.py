"""Run the main job on full or read-only folders; check the message and the rerun.

    python tests/faults/disk.py

It needs Linux and root, because every fault is a mount. The first run is undisturbed. Then each folder that
a run writes to is once on a small disk that fills up and once read-only. The job must exit with 1 and print
one line with the place and the fix; with enough space again, it must end with the same bytes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults import forked, state


def main() -> None:
    """Print a line for each fault and a summary."""
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="medfocus-disk-"))
    failed = 0
    with forked.ready(folder):
        expected = state.outputs(_run(folder, "undisturbed", 0)[0])
        faults: list[tuple[str, str, Callable[[Path], object]]] = [
            *((f"{place} is full at {kib} KiB", place, _full(kib)) for place, kib in FULL),
            *((f"{place} is read-only", place, _read_only) for place in READ_ONLY),
        ]
        for name, place, fault in faults:
            project = forked.new_project(folder, "fault")
            (project / place).mkdir(parents=True, exist_ok=True)
            with _mounted(project / place, fault):
                _, message = _run(folder, "fault", 1)
                bad = state.damaged(project)
                kept = state.finished(project)
                shutil.copytree(project / place, folder / "saved", symlinks=True)
            shutil.rmtree(project / place)
            (folder / "saved").rename(project / place)
            job, _ = _start(project, folder)
            again = kept.entries & job.made()
            same = job.code == 0 and state.outputs(project) == expected
            named = str(project / place) in message and " again" in message
            failed += not (same and named and not bad and not again)
            print(
                f"{name}: {'named' if named else 'NOT NAMED'}, {len(bad)} corrupt, {len(again)} lost, rerun "
                f"{'byte-identical' if same else 'DIFFERENT'}\n    {message}",
                flush=True,
            )
    shutil.rmtree(folder)
    print(f"{len(faults)} faults of disks: {failed} failed; {time.monotonic() - began:.0f} s")
    sys.exit(failed > 0)


FULL = [
    (".cache", 16),
    (".cache", 200),
    (".cache", 1000),
    ("data", 300),
    (".dvc/cache", 200),
    ("mlruns", 64),
    ("reports", 100),
]
READ_ONLY = [".cache", "data", ".dvc/cache", "reports"]


def _full(kib: int) -> Callable[[Path], object]:
    def mount(place: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", place], check=True)

    return mount


def _read_only(place: Path) -> None:
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)


@contextmanager
def _mounted(place: Path, mount: Callable[[Path], object]) -> Iterator[None]:
    mount(place)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def _run(folder: Path, name: str, code: int) -> tuple[Path, str]:
    """Run a job that must exit with a code; return its project and its last line."""
    project = folder / name if (folder / name).exists() else forked.new_project(folder, name)
    job, output = _start(project, folder)
    if job.code != code:
        raise RuntimeError(f"{name}: ended with {job.code} and not {code}: {output}")
    return project, output.strip().rpartition("\n")[2]


def _start(project: Path, folder: Path) -> tuple[forked.Job, str]:
    log = folder / "log"
    log.unlink(missing_ok=True)
    job = forked.start(project, log, folder / "made")
    job.follow(forked.PARTS[0], float("inf"))
    return job, log.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
