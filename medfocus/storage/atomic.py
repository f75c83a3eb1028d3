"""Write files and folders atomically, and seal cached files with their sha256."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

_log = logging.getLogger(__name__)


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically: if the process is killed meanwhile, the file keeps its earlier content."""
    with new_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write, and rename it to ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # do not hide the first error
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sealed_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path as ``new_file`` does, and write the file's sha256 to ``path``.sha256."""
    with new_file(path) as temporary:
        yield temporary
        write(_seal_of(path), digest(temporary))


def is_sound(path: Path) -> bool:
    """Return whether a cached file exists and matches its seal, if there is one; log a mismatch."""
    if not path.is_file():
        return False
    seal = _seal_of(path)
    if not seal.is_file() or seal.read_text(encoding="ascii", errors="replace") == digest(path):
        return True
    _log.warning("%s is damaged (its sha256 differs from its seal); it will be made again.", path)
    return False


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """Return the sha256 hex of a file, without reading all of it into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to ``path`` if the block ends without an error.

    Also remove the temporary folders that killed processes left. Raises FileExistsError if ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(
            f"{path} already exists and is not overwritten. Give another folder, or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not psutil.pid_exists(int(left.name.split(".")[-2])):
            shutil.rmtree(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
