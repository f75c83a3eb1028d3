"""A new project outside a clone, with the code of the installed package."""

from __future__ import annotations

import compileall
import shutil
import subprocess
from pathlib import Path

from flows.study.study import CODE_HERE
from medfocus.serving.defaults import packaged_params
from medfocus.storage import atomic

_CODE = Path(__file__).resolve().parents[2]  # contains the packages flows and medfocus
FILES = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore")
FILES += (".dvc/config", ".dvc/.gitignore", ".dvc/plots/medfocus.json")
IMAGES = "examples/pneumoniamnist"  # of the embedded study


def create_project(folder: Path) -> None:
    """Create a git repository in ``folder`` with DVC and the embedded study; it uses this package's code.

    Raises:
        FileExistsError: The folder already has a file of a project. Nothing is written.
        RuntimeError: git is missing or fails.
    """
    packed = _CODE / "flows" / "project"  # exists in a wheel; a clone has the files at its root
    source = packed if packed.is_dir() else _CODE
    if taken := [name for name in (*FILES, IMAGES) if (folder / name).exists()]:
        raise FileExistsError(f"{folder / taken[0]} already exists. Give a new folder, or use this project.")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".git").exists():
        _git_init(folder)
    for name in FILES:
        path = packaged_params() if name == "params.yaml" else source / name
        text = path.read_text(encoding="utf-8")
        if name == "dvc.yaml":
            text = text.replace(CODE_HERE, f"  - code: {_CODE.as_posix()}\n", 1)
        atomic.write(folder / name, text)
    shutil.copytree(source / IMAGES, folder / IMAGES)
    if packed.is_dir():  # otherwise DVC would see later .pyc files as changed code
        for package in ("medfocus", "flows"):
            compileall.compile_dir(_CODE / package, quiet=2)


def _git_init(folder: Path) -> None:
    try:
        done = subprocess.run(["git", "init", "--quiet", str(folder)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("git is not installed, and DVC needs it. Install git, then try again.") from error
    if done.returncode != 0:
        raise RuntimeError(f"git init {folder} failed: {done.stderr.strip()}. Correct this, then try again.")
