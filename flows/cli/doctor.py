"""A check of the requirements of a run, with a fix for each fault. It changes and downloads nothing."""

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
from typing import TYPE_CHECKING, Literal

import psutil

from flows.cli import terminal
from flows.servers.mlflow import MLFLOW_PORT
from flows.servers.prefect import PREFECT_PORT, prefect_answers
from flows.servers.processes import answers, answers_at, must_answer
from flows.study.study import params_files

if TYPE_CHECKING:
    from flows.study.params import MasksParams

PACKAGE = "medfocusclip"
_SHOWN = ("torch", "prefect", "dvc", "mlflow", "open_clip_torch", "sam2")
_LITTLE, _ENOUGH = 1e9, 5e9  # free bytes: too few for any run, enough for a study
_MEMORY = 4e9  # bytes; a small study needs 2e9
_SECONDS = 3  # for a server's answer

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One result of the check."""

    subject: str
    state: State
    text: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Check packages, machine, project, stores, servers, caches and disks."""
    yield from packages()
    yield from machine()
    try:
        home = terminal.project()
    except FileNotFoundError:
        fix = "Change to a project's folder, or create a project with medfocus new FOLDER."
        yield Finding("project", "fault", f"{Path.cwd()} is in no project", fix)
        return
    yield from project(home)
    yield from stores(home)
    yield from servers()
    yield from caches(home)
    yield from disks(home)


def packages() -> Iterator[Finding]:
    """Check Python and the version of every required package."""
    from packaging.requirements import Requirement

    wrong = []
    for line in importlib.metadata.requires(PACKAGE) or []:
        required = Requirement(line)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        version = _version(required.name)
        if version is None:
            wrong.append(f"{required.name} is missing")
        elif not required.specifier.contains(version, prereleases=True):
            wrong.append(f"{required.name} is {version}, required is {required.specifier}")
    versions = ", ".join(f"{name} {version}" for name in _SHOWN if (version := _version(name)))
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    if wrong:
        yield Finding(
            "packages", "fault", "; ".join(wrong), "Run make install, or install the package again with pip."
        )
    else:
        yield Finding("packages", "ok", versions)
    if sys.dont_write_bytecode:
        fault = "PYTHONDONTWRITEBYTECODE is set, so every start compiles all libraries again"
        yield Finding("start", "warning", fault, "Run unset PYTHONDONTWRITEBYTECODE.")


def machine() -> Iterator[Finding]:
    """Check cores, memory and the device of the setting ``device: auto``."""
    memory = psutil.virtual_memory()
    text = f"{os.cpu_count()} cores, {_size(memory.available)} of {_size(memory.total)} memory free"
    if memory.available < _MEMORY:
        fix = "Close other programs, or lower masks.batch_size and views.batch_size in the params file."
        yield Finding("machine", "warning", text, fix)
    else:
        yield Finding("machine", "ok", text)
    try:
        import torch
    except Exception as error:  # a broken installation can raise any error
        yield Finding("device", "fault", f"torch cannot be imported ({error})", "Run make install.")
        return
    if torch.cuda.is_available():
        yield Finding("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}")
    elif shutil.which("nvidia-smi"):
        fix = "Compare the driver with torch's CUDA version. Until then, device: auto uses the CPU."
        yield Finding("device", "warning", "there is an NVIDIA driver, but torch sees no GPU", fix)
    else:
        yield Finding("device", "ok", "cpu; torch sees no GPU")


def project(home: Path) -> Iterator[Finding]:
    """Check the clone and the params files of its studies."""
    from flows.study.params import load_params

    if not (home / ".git").exists():
        fault = f"{home} is not a git repository, and DVC needs one"
        yield Finding("project", "fault", fault, "Run git init there, or clone the project.")
    elif shutil.which("git") is None:
        yield Finding("project", "fault", "git is not installed, and DVC needs it", "Install git.")
    elif not os.access(home, os.W_OK):
        yield Finding("project", "fault", f"{home} is not writable", f"Run chmod -R u+w {home}.")
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
        with contextlib.chdir(path.parent):  # a configuration may be a relative path
            yield from _masks(path, params.masks)
        for name, data in params.datasets.items():
            folder = path.parent / data.root
            if not folder.is_dir() and not params.phantoms:
                fault = f"{path.name}: the images of {name} are not at {folder}"
                yield Finding("study", "warning", fault, f"Put them there, or correct root in {path}.")
    yield Finding("studies", "ok", f"{good} params files are valid")


def _masks(path: Path, masks: MasksParams) -> Iterator[Finding]:
    """Check that SAM2 knows the strategy and sees images at about the size of its training."""
    from medfocus.masks.sam2.model import check_interest, size_fault

    try:
        if masks.segmenter == "sam2" and masks.strategy == "interest":
            check_interest(masks.config)
        fault = size_fault(masks.config, masks.image_size) if masks.segmenter == "sam2" else ""
    except (ValueError, OSError) as error:
        yield Finding("study", "fault", f"{path.name}: {error}", f"Correct masks.config in {path}.")
        return
    if fault:
        yield Finding("study", "warning", f"{path.name}: {fault}", f"Set it to null in {path}.")


def stores(home: Path) -> Iterator[Finding]:
    """Check the store of MLflow's runs and models: a server, or a file of the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        yield _server("MLflow", uri, "MLFLOW_TRACKING_URI", "the run then writes to mlflow.db")
        return
    database = home / "mlflow.db"
    if uri:
        yield Finding("MLflow", "ok", f"MLFLOW_TRACKING_URI is {_without_password(uri)}")
    elif not database.exists():
        yield Finding("MLflow", "ok", f"no runs yet; the first run creates {database}")
    else:
        try:
            with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
                verdict = str(opened.execute("PRAGMA quick_check").fetchone()[0])
        except sqlite3.Error as error:
            verdict = str(error)
        if verdict == "ok":
            yield Finding("MLflow", "ok", f"{database}, {_size(database.stat().st_size)}, is sound")
        else:
            fix = "Restore a backup (docs/operations.md), or move the file away; a run creates a new one."
            yield Finding("MLflow", "fault", f"{database} is damaged ({verdict})", fix)


def servers() -> Iterator[Finding]:
    """Check Prefect's server and the ports of Prefect's and MLflow's pages."""
    if address := os.environ.get("PREFECT_API_URL"):
        without = "the run then starts a server on loopback"
        yield _server("Prefect", f"{address}/health", "PREFECT_API_URL", without)
    elif prefect_answers():
        yield Finding("Prefect", "ok", f"a server answers at port {PREFECT_PORT}, and runs use it")
    elif answers_at(PREFECT_PORT):
        fault = f"another program uses port {PREFECT_PORT}"
        yield Finding(
            "Prefect",
            "warning",
            fault,
            "Runs use another port, but make up needs this port; end that program.",
        )
    else:
        yield Finding("Prefect", "ok", "no server runs; each run starts one on loopback")
    if answers_at(MLFLOW_PORT) and not answers(f"http://127.0.0.1:{MLFLOW_PORT}/health"):
        fault = f"another program uses port {MLFLOW_PORT}"
        yield Finding(
            "MLflow's page", "warning", fault, "make ui and make up need this port; end that program."
        )


def caches(home: Path) -> Iterator[Finding]:
    """Show the size of the caches, which only save time."""
    from huggingface_hub import constants

    kinds = sorted(folder for folder in (home / ".cache").glob("*") if folder.is_dir())
    sizes = ", ".join(f"{folder.name} {_size(_bytes_below(folder))}" for folder in kinds)
    yield Finding("cache", "ok", f"{home / '.cache'}: {sizes or 'empty'}")
    hub = Path(constants.HF_HUB_CACHE)
    size = _size(_bytes_below(hub)) if hub.is_dir() else "empty"
    yield Finding("weights", "ok", f"{hub}: {size}; medfocus models lists them")


def disks(home: Path) -> Iterator[Finding]:
    """Check the free space on every disk that a run writes to."""
    seen: set[int] = set()
    prefect = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    for folder in (home, prefect, Path(tempfile.gettempdir())):
        if not folder.exists() or folder.stat().st_dev in seen:
            continue
        seen.add(folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        text = f"{_size(free)} free at {folder}"
        if free < _LITTLE:
            fix = f"Free some space. You may delete {home / '.cache'}; the next run takes longer."
            yield Finding("disk", "fault", text, fix)
        elif free < _ENOUGH:
            yield Finding("disk", "warning", text, "A study of many images may need more.")
        else:
            yield Finding("disk", "ok", text)


def _server(name: str, url: str, setting: str, without: str) -> Finding:
    try:
        must_answer(url, setting, without, seconds=_SECONDS)
    except ConnectionError as error:
        return Finding(name, "fault", _without_password(str(error)), f"Start it, or run unset {setting}.")
    return Finding(name, "ok", f"answers at {_without_password(url)}")


def _without_password(text: str) -> str:
    """Return a text without the user names and passwords of its addresses."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _bytes_below(folder: Path) -> int:
    """Return the size of the files below; links are not followed, so that hub files count once."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
