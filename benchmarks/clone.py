"""A clone of the project in another folder, for benchmarks of whole studies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def clone(folder: Path, params: dict[str, Any]) -> dict[str, str]:
    """Make a clone with empty caches in ``folder``; return the environment for commands in it."""
    folder.mkdir()
    for name in ("medfocus", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PREFECT_HOME": str(folder / ".prefect"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),  # not the clone of this file
    }
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "."],
        ["git", "-c", "user.name=b", "-c", "user.email=b@b", "commit", "--quiet", "-m", "start"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return environment
