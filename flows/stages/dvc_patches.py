"""Adapt DVC in the two places where its public interface does not reach.

`in_this_process` replaces DVC's private function `_run`, which starts a subprocess for each stage. The
subprocess costs 3 to 11 s for each stage that imports PyTorch. It turns the stage's exception and Ctrl-C
into an exit code, so that the flow can neither explain nor retry a fault, and it keeps writing if the flow
is killed.

`AtomicFiles` patches nothing: `Repo` takes it as an argument. DVC itself writes dvc.lock and its list of
locked paths in place, and creates an empty object in its cache before it tries to clone a file. A kill
there can leave a dvc.lock that is valid YAML but lacks stages; a clone of the project, without a run cache,
would compute them again. With `AtomicFiles` each file appears whole or not at all.

This module checks at import that the installed DVC has the names and parameters on which it relies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import io
import os
import pkgutil
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dvc.stage.run
from dvc.fs import LocalFileSystem
from dvc.repo import Repo
from dvc_objects.fs.utils import tmp_fname

from medfocus.storage import atomic

PINNED = {"dvc": "3.67.1", "dvc-objects": "5.2.0"}  # as in pyproject.toml
_RELIED_ON = {  # name: the parameters that this module passes or receives
    "dvc.stage.run:_run": {"executable", "cmd", "kwargs"},
    "dvc.repo:Repo.__init__": {"fs"},
    "dvc.rwlock:rwlock": {"fs"},
    "dvc.utils.serialize:modify_yaml": {"path", "fs"},
    "dvc.fs:FileSystem.open": {"path", "mode", "kwargs"},
    "dvc.fs:FileSystem.reflink": {"from_info", "to_info"},
}


def _check() -> None:
    """Raise ImportError if the installed DVC lacks a name or one of its parameters."""
    for name, needed in _RELIED_ON.items():
        try:
            missing = needed - set(inspect.signature(pkgutil.resolve_name(name)).parameters)
        except (ImportError, AttributeError):
            missing = {"this name"}
        if missing:
            installed = " and ".join(f"{package} {importlib.metadata.version(package)}" for package in PINNED)
            pins = " ".join(f"{package}=={version}" for package, version in PINNED.items())
            raise ImportError(
                f"{name}: the installed {installed} lack {', '.join(sorted(missing))}, which the flow needs. "
                f"Run make install, or pip install {pins}."
            )


_check()


class AtomicFiles(LocalFileSystem):
    """DVC's local file system, except that written texts and cloned files appear whole or not at all."""

    def open(self, path: Any, mode: Any = "r", **kwargs: Any) -> Any:
        """Open a file; a text file that is written replaces the old one at the end of its ``with`` block."""
        return _replacement(Path(path)) if mode in ("w", "w+") else super().open(path, mode, **kwargs)

    def reflink(self, from_info: Any, to_info: Any) -> None:
        """Clone a file under a temporary name and move it into place."""
        temporary = Path(to_info).with_name(tmp_fname())
        super().reflink(from_info, str(temporary))
        temporary.replace(to_info)


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    atomic.write(path, text.getvalue())


def open_repo() -> Repo:
    """Open the DVC repository of the current folder with ``AtomicFiles``."""
    repo = Repo(fs=AtomicFiles())
    repo.fs.hash_jobs = repo.config["core"].get("checksum_jobs") or repo.fs.hash_jobs  # as without an ``fs``
    return repo


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Let DVC run stages as function calls in this process."""
    subprocess = dvc.stage.run._run
    dvc.stage.run._run = run_here
    try:
        yield
    finally:
        dvc.stage.run._run = subprocess


def run_here(executable: str | None, cmd: str, **kwargs: Any) -> None:
    """Run `python -m flows.stages.NAME --key value` as a call of the module's main.

    The whole process has the folder and the environment that DVC gives the stage until the stage ends.
    """
    python, flag, module, *arguments = shlex.split(cmd)
    if (python, flag) != ("python", "-m") or not module.startswith("flows.stages."):
        raise ValueError(
            f"dvc.yaml: the command {cmd!r} is not `python -m flows.stages.NAME ...`; the flow cannot run it."
        )
    with contextlib.chdir(kwargs["cwd"]), _environment(kwargs["env"]):
        importlib.import_module(module).main(arguments)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, among them DVC_ROOT and DVC_STAGE, and restore their values."""
    before = {name: os.environ.get(name) for name in variables if os.environ.get(name) != variables[name]}
    os.environ.update({name: variables[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
