"""A project in a folder of its own, for packages that were installed and not cloned."""

from __future__ import annotations

import compileall
import subprocess
from pathlib import Path

from flows.study.study import CODE_HERE
from medfocus.storage import atomic

_CODE = Path(__file__).resolve().parents[2]  # holds the packages flows and medfocus
FILES = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore")
FILES += (".dvc/config", ".dvc/.gitignore", ".dvc/plots/medfocus.json")


def begin(folder: Path) -> None:
    """Make a git repository of ``folder``, with DVC and the embedded study; the code is this installation's.

    Raises:
        FileExistsError: A file of a project is there already; then nothing is written.
        RuntimeError: git is missing or fails.
    """
    packed = _CODE / "flows" / "project"  # in a wheel; in a clone they stand where they are used
    source = packed if packed.is_dir() else _CODE
    if taken := [name for name in FILES if (folder / name).exists()]:
        raise FileExistsError(
            f"{folder / taken[0]} is there already. Give a new folder, or work in this one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git").exists():
        _git_init(folder)
    for name in FILES:
        text = (source / name).read_text(encoding="utf-8")
        if name == "dvc.yaml":
            text = text.replace(CODE_HERE, f"  - code: {_CODE.as_posix()}\n", 1)
        atomic.write(folder / name, text)
    if packed.is_dir():  # DVC would take files that Python compiles later for changed code
        for package in ("medfocus", "flows"):
            compileall.compile_dir(_CODE / package, quiet=2)


def _git_init(folder: Path) -> None:
    try:
        done = subprocess.run(["git", "init", "--quiet", str(folder)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("git is not installed, and DVC needs it. Install it, then try again.") from error
    if done.returncode != 0:
        raise RuntimeError(f"git init {folder} failed: {done.stderr.strip()}. Mend that, then try again.")
