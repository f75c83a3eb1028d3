"""The state of a project after a fault: its outputs, its finished work, its damaged files."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from medfocus.storage import atomic

# Files with times and ids, which differ between runs; they are checked otherwise or not at all.
_OWN = ("reports/costs.csv", "reports/index.html", "reports/study.csv", "data/.job.json", "data/.job.lock")


def outputs(project: Path) -> dict[str, str]:
    """Return the outputs of a finished run as name -> sha256."""
    digests = {"dvc.lock": _sha256((project / "dvc.lock").read_bytes())}
    for folder in ("data", "reports"):
        for path in sorted((project / folder).rglob("*")):
            name = path.relative_to(project).as_posix()
            if path.is_file() and name not in _OWN:
                digests[name] = _sha256(path.read_bytes())
    study = (project / "reports/study.csv").read_text(encoding="utf-8").splitlines()
    digests["reports/study.csv"] = _sha256("\n".join(line.rpartition(",")[0] for line in study).encode())
    page = (project / "reports/index.html").read_text(encoding="utf-8")
    digests["reports/index.html"] = (
        "of this dvc.lock" if digests["dvc.lock"] in page else "of another dvc.lock"
    )
    return digests | registry(project)


def registry(project: Path) -> dict[str, str]:
    """Return the champions with their cell, the digests of their files, and their model cards.

    Data sheets are left out, because they contain the commit, which differs between projects.
    """
    digests: dict[str, str] = {}
    champions = _rows(
        project,
        "select a.name, t.value, v.storage_location from registered_model_aliases a"
        " join model_versions v on v.name = a.name and v.version = a.version"
        " join model_version_tags t on t.name = a.name and t.version = a.version and t.key = 'cell_key'"
        " where a.alias = 'champion'",
    )
    for name, cell_key, place in champions:
        digests[f"champion of {name}"] = cell_key
        kept = Path(place.removeprefix("file://"))
        for path in [kept / "card.md", *sorted((kept / "artifacts").rglob("*"))]:
            if path.is_file():
                digests[f"champion of {name}: {path.name}"] = _sha256(path.read_bytes())
    return digests


def left_running(project: Path) -> int:
    """Return the number of MLflow's runs that are neither FINISHED, FAILED nor KILLED."""
    ((count,),) = _rows(
        project, "select count(*) from runs where status not in ('FINISHED', 'FAILED', 'KILLED')"
    )
    return count


@dataclass(frozen=True)
class Finished:
    """Finished work, which must not be repeated."""

    entries: frozenset[str]  # masks and features on disk, "folder key"
    cells: dict[str, tuple[int, int]]  # checkpoints of the cache by their file: inode and time of writing
    stages: dict[str, Any]  # of dvc.lock


def finished(project: Path) -> Finished:
    """Return the finished work of a project without a running job."""
    entries = {f"{path.parent.name} {key}" for path in _shards(project) for key in _keys(path)}
    return Finished(frozenset(entries), cells(project), _locked(project))


def cells(project: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and time of each checkpoint in the cache, which a second fit would change."""
    stats = {path.name: path.stat() for path in (project / ".cache/cells").glob("*/[!.]*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def damaged(project: Path) -> list[str]:
    """Return the damaged files among those that a cache, DVC or MLflow names."""
    return [str(path.relative_to(project)) for path in _damaged(project)]


def _damaged(project: Path) -> Iterator[Path]:
    for path in _shards(project):
        try:
            with zipfile.ZipFile(path) as shard:
                intact = shard.testzip() is None
        except zipfile.BadZipFile:
            intact = False
        if not intact:
            yield path
    for path in (project / ".cache/cells").glob("*/[!.]*.safetensors"):
        if not (atomic.is_sound(path) and _opens(path)):
            yield path
    for path in (project / ".cache/cells").glob("*/[!.]*.json"):
        if not _is_json(path):
            yield path
    objects = project / ".dvc/cache/files/md5"
    for path in objects.glob("??/*"):
        name = path.parent.name + path.name.removesuffix(".dir")
        if len(name) == 32 and hashlib.md5(path.read_bytes()).hexdigest() != name:
            yield path
    try:
        stages = _locked(project)
    except (yaml.YAMLError, AttributeError):
        yield project / "dvc.lock"
        stages = {}
    for stage in stages.values():
        for out in stage.get("outs", []):
            path = project / out["path"]
            if path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() != out["md5"]:
                yield path
    rwlock = project / ".dvc/tmp/rwlock"
    if rwlock.exists() and not _is_json(rwlock):
        yield rwlock
    if (project / "mlflow.db").exists() and _rows(project, "pragma integrity_check") != [("ok",)]:
        yield project / "mlflow.db"


def _shards(project: Path) -> Iterator[Path]:
    for kind in ("masks", "features"):
        yield from sorted((project / ".cache" / kind).glob("*/*.zip"))


def _keys(shard: Path) -> list[str]:
    with zipfile.ZipFile(shard) as file:
        return [Path(name).stem for name in file.namelist()]


def _locked(project: Path) -> dict[str, Any]:
    lock = project / "dvc.lock"
    return yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            return all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _rows(project: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
