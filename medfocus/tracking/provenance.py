"""The origin of a run: code, data, packages, seeds, host."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("torch", "torchvision", "open_clip_torch", "sam2", "scikit-learn", "mlflow")


def made_from(repo: Path, seeds: Sequence[int]) -> dict[str, str]:
    """Return the tags of a run's origin: code, data, packages, seeds, host.

    ``git.dirty`` is "true" if tracked files other than ``dvc.lock`` and ``params.yaml`` differ from the
    commit. Outside a git repository, or before its first commit, ``git.commit`` is "none".
    """
    commit = _git(repo, "rev-parse", "--verify", "--quiet", "HEAD")
    # MLflow keeps these two files with every study, and a run itself changes dvc.lock.
    code = (":/", ":(top,exclude)*dvc.lock", ":(top,exclude)*params.yaml")
    return {
        "git.commit": commit or "none",
        "git.dirty": str(bool(_git(repo, "status", "--porcelain", "-uno", "--", *code))).lower(),
        "dvc.lock.sha256": lock_digest(repo),
        "seeds": ",".join(map(str, seeds)),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{f"version.{package}": version for package, version in installed(PACKAGES)},
        **({"mlflow.source.git.commit": commit} if commit else {}),  # MLflow's pages show this tag
    }


def lock_digest(repo: Path) -> str:
    """Return the sha256 hex of ``dvc.lock``, or "none" if it does not exist."""
    lock = repo / "dvc.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else "none"


def installed(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (package, version) for each installed package."""
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _git(repo: Path, *arguments: str) -> str:
    """Return the output of a git command, or "" if it fails or git is missing."""
    try:
        result = subprocess.run(
            ["git", "-C", str(repo), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
