"""What this machine has of what a run needs; every fault with its fix. Nothing is changed or fetched."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from flows.cli import terminal
from flows.servers.servers import MLFLOW_PORT, PREFECT_PORT, answers, answers_at, must_answer, prefect_answers
from flows.study.study import params_files

PACKAGE = "medfocusclip"
_SHOWN = ("torch", "prefect", "dvc", "mlflow", "open_clip_torch", "sam2")
_LITTLE, _ENOUGH = 1e9, 5e9  # bytes free: below the first nothing goes, below the second a study may not
_MEMORY = 4e9  # bytes; a small study takes two
_SECONDS = 3  # that a server has to answer

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """A line of the examination."""

    what: str
    state: State
    said: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Look at packages, machine, project, stores, servers, caches and disks, one after the other."""
    yield from packages()
    yield from machine()
    try:
        home = terminal.project()
    except FileNotFoundError as error:
        fault, _, fix = str(error).partition("; ")
        yield Finding("project", "fault", fault, fix[:1].upper() + fix[1:])
        return
    yield from project(home)
    yield from stores(home)
    yield from servers()
    yield from caches(home)
    yield from disks(home)


def packages() -> Iterator[Finding]:
    """Python, and whether every package is there in a version that is asked for."""
    from packaging.requirements import Requirement

    wrong = []
    for line in importlib.metadata.requires(PACKAGE) or []:
        asked = Requirement(line)
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{asked.name} is missing")
            continue
        if not asked.specifier.contains(found, prereleases=True):
            wrong.append(f"{asked.name} is {found}, asked is {asked.specifier}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SHOWN if _is_there(name))
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    if wrong:
        yield Finding("packages", "fault", "; ".join(wrong), "Run make install, or pip install it again.")
    else:
        yield Finding("packages", "ok", versions)
    if sys.dont_write_bytecode:
        fault = "PYTHONDONTWRITEBYTECODE is set, so every start compiles all libraries anew"
        yield Finding("start", "warning", fault, "Run unset PYTHONDONTWRITEBYTECODE.")


def machine() -> Iterator[Finding]:
    """Cores, memory and the device that the setting ``device: auto`` takes."""
    memory = psutil.virtual_memory()
    said = f"{os.cpu_count()} cores, {_size(memory.available)} of {_size(memory.total)} memory free"
    if memory.available < _MEMORY:
        fix = "End other programs, or lower masks.batch_size and views.batch_size in the params file."
        yield Finding("machine", "warning", said, fix)
    else:
        yield Finding("machine", "ok", said)
    try:
        import torch
    except Exception as error:  # a broken install raises nearly anything
        yield Finding("device", "fault", f"torch cannot be imported ({error})", "Run make install.")
        return
    if torch.cuda.is_available():
        yield Finding("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}")
    elif shutil.which("nvidia-smi"):
        fix = "Compare the driver with torch's CUDA; until then device: auto takes the processor."
        yield Finding("device", "warning", "there is an NVIDIA driver, but torch sees no GPU", fix)
    else:
        yield Finding("device", "ok", "cpu; torch sees no GPU")


def project(home: Path) -> Iterator[Finding]:
    """The clone, and the params files of its studies."""
    from flows.study.params import load_params

    if not (home / ".git").exists():
        fault = f"{home} is no git clone, and DVC needs one"
        yield Finding("project", "fault", fault, "Run git init there, or clone the project.")
    elif shutil.which("git") is None:
        yield Finding("project", "fault", "git is not installed, and DVC needs it", "Install git.")
    elif not os.access(home, os.W_OK):
        yield Finding("project", "fault", f"{home} cannot be written", f"Run chmod -R u+w {home}.")
    else:
        yield Finding("project", "ok", str(home))
    files = params_files(home)
    good = 0
    for path in files:
        try:
            params = load_params(path)
        except (ValueError, OSError) as error:
            yield Finding("study", "fault", " ".join(str(error).split()), f"Correct {path}.")
            continue
        good += 1
        for name, data in params.datasets.items():
            folder = path.parent / data.root
            if not folder.is_dir() and not params.phantoms:
                fault = f"{path.name}: the images of {name} are not at {folder}"
                yield Finding("study", "warning", fault, f"Put them there, or correct root in {path}.")
    yield Finding("studies", "ok", f"{good} params files can be read")


def stores(home: Path) -> Iterator[Finding]:
    """MLflow's runs and registry: a server, or a file of the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        yield _server("MLflow", uri, "MLFLOW_TRACKING_URI", "the runs are then kept in mlflow.db")
        return
    database = home / "mlflow.db"
    if uri:
        yield Finding("MLflow", "ok", f"MLFLOW_TRACKING_URI is {_without_password(uri)}")
    elif not database.exists():
        yield Finding("MLflow", "ok", f"no runs yet; the first one makes {database}")
    else:
        try:
            with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
                verdict = str(opened.execute("PRAGMA quick_check").fetchone()[0])
        except sqlite3.Error as error:
            verdict = str(error)
        if verdict == "ok":
            yield Finding("MLflow", "ok", f"{database}, {_size(database.stat().st_size)}, is sound")
        else:
            fix = "Put a backup in its place (docs/operations.md), or move it away: a run makes a new one."
            yield Finding("MLflow", "fault", f"{database} is damaged ({verdict})", fix)


def servers() -> Iterator[Finding]:
    """Who keeps Prefect's records, and whether MLflow's pages are open."""
    if given := os.environ.get("PREFECT_API_URL"):
        without = "a server on loopback is then started for the run"
        yield _server("Prefect", f"{given}/health", "PREFECT_API_URL", without)
    elif prefect_answers():
        yield Finding("Prefect", "ok", f"a server answers at port {PREFECT_PORT}; runs use it")
    elif answers_at(PREFECT_PORT):
        fault = f"port {PREFECT_PORT} is taken by another program"
        yield Finding("Prefect", "warning", fault, "Runs take another port; make up needs this one.")
    else:
        yield Finding("Prefect", "ok", "no server runs; each run starts one on loopback")
    if answers_at(MLFLOW_PORT) and not answers(f"http://127.0.0.1:{MLFLOW_PORT}/health"):
        fault = f"port {MLFLOW_PORT} is taken by another program"
        yield Finding("MLflow's page", "warning", fault, "make ui and make up need it; end that program.")


def caches(home: Path) -> Iterator[Finding]:
    """What is kept only to save time, and how much room it takes."""
    from huggingface_hub import constants

    kinds = sorted(folder for folder in (home / ".cache").glob("*") if folder.is_dir())
    sizes = ", ".join(f"{folder.name} {_size(_held(folder))}" for folder in kinds)
    yield Finding("cache", "ok", f"{home / '.cache'}: {sizes or 'empty'}")
    hub = Path(constants.HF_HUB_CACHE)
    held = f"{hub}: {_size(_held(hub))}" if hub.is_dir() else f"{hub}: empty"
    yield Finding("weights", "ok", f"{held}; medfocus models says which")


def disks(home: Path) -> Iterator[Finding]:
    """Room on every disk that a run writes to."""
    seen: set[int] = set()
    for place in (home, Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser(), _temporary()):
        if not place.exists() or place.stat().st_dev in seen:
            continue
        seen.add(place.stat().st_dev)
        free = shutil.disk_usage(place).free
        said = f"{_size(free)} free at {place}"
        if free < _LITTLE:
            yield Finding("disk", "fault", said, f"Free some; {home / '.cache'} may go, which costs time.")
        elif free < _ENOUGH:
            yield Finding("disk", "warning", said, "A study of many images may need more.")
        else:
            yield Finding("disk", "ok", said)


def _server(name: str, url: str, setting: str, without: str) -> Finding:
    try:
        must_answer(url, setting, without, seconds=_SECONDS)
    except ConnectionError as error:
        told = _without_password(str(error))
        return Finding(name, "fault", told, f"Start it, or run unset {setting}.")
    return Finding(name, "ok", f"answers at {_without_password(url)}")


def _without_password(text: str) -> str:
    """Addresses may hold a name and a password; neither is for a screen."""

    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _held(folder: Path) -> int:
    """Bytes of the files below; links are not followed, so that the hub's cache counts once."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _is_there(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
