"""Files that are there whole or not at all, and files that know their hash."""

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
    """Write a file beside and move it in: who is killed here leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # of two errors the first is the one to tell
            beside.unlink(missing_ok=True)


def seal(beside: Path, path: Path) -> None:
    """Move a finished file to its place in a cache, its sha256 written first to ``path``.sha256."""
    write(_seal_of(path), digest(beside))
    beside.replace(path)


def is_sound(path: Path) -> bool:
    """Whether a file of a cache is there and is what was sealed; if it is not, that is reported.

    A file without a seal is believed: it is from before there were any.
    """
    if not path.is_file():
        return False
    seal = _seal_of(path)
    if not seal.is_file() or seal.read_text(encoding="ascii", errors="replace") == digest(path):
        return True
    _log.warning("%s is damaged (its sha256 is another): it is made again.", path)
    return False


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """sha256 hex over a file's bytes, which need not fit into the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to be filled, which takes its place where nothing is raised.

    What a kill left of an earlier one is removed. Raises FileExistsError where ``path`` is there already.
    """
    if path.exists():
        raise FileExistsError(
            f"{path} is there already, and nothing is written over. Give another folder, or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not psutil.pid_exists(int(left.name.split(".")[-2])):
            shutil.rmtree(left)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        yield beside
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
