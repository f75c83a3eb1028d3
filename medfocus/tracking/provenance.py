"""From what a run was made: code, data, packages, seeds, host."""

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
    """Tags that say from what a run was made: code, data, packages, seeds, host.

    ``git.dirty`` is "true" where tracked files but ``dvc.lock`` and ``params.yaml`` differ from the commit;
    outside of a git repository, or before its first commit, ``git.commit`` is "none".
    """
    commit = _git(repo, "rev-parse", "--verify", "--quiet", "HEAD")
    # The two are kept with every study, and a run may be what changes the lock.
    code = (":/", ":(top,exclude)*dvc.lock", ":(top,exclude)*params.yaml")
    return {
        "git.commit": commit or "none",
        "git.dirty": str(bool(_git(repo, "status", "--porcelain", "-uno", "--", *code))).lower(),
        "dvc.lock.sha256": lock_digest(repo),
        "seeds": ",".join(map(str, seeds)),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        **{f"version.{package}": version for package, version in installed(PACKAGES)},
        **({"mlflow.source.git.commit": commit} if commit else {}),  # the one that MLflow's pages show
    }


def lock_digest(repo: Path) -> str:
    """sha256 hex over ``dvc.lock``; "none" where there is none."""
    lock = repo / "dvc.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else "none"


def installed(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(package, version) of those that are installed."""
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _git(repo: Path, *arguments: str) -> str:
    """Output of a git command, "" where it fails or git is absent."""
    try:
        result = subprocess.run(
            ["git", "-C", str(repo), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
