"""Run a DVC stage inside this process.

DVC alone decides whether a stage is stale, locks its paths, keeps its run cache and writes
dvc.lock; only the subprocess is saved, which would spend 10 to 20 s on importing torch, open_clip
and MLflow for every stage. The seam is four private functions of DVC, pinned with it; a contract
test holds that what ran here leaves `dvc status` clean.

DVC writes dvc.lock and its list of locked paths in place. Where a file system cannot clone files, it learns
that from an empty object that it made in its cache. A kill can leave half of the ones and the empty other.
Here each appears whole or not at all; what a killed `dvc repro` left is made again.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import dvc.rwlock
import dvc.stage.run
import dvc.utils.serialize._common
import dvc_objects.fs.system
from dvc.exceptions import ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError
from dvc.utils.serialize import ParseError
from dvc.utils.strictyaml import YAMLValidationError
from dvc_objects.fs.utils import tmp_fname

from medfocus.storage import atomic


class StageBusyError(RuntimeError):
    """Another process holds the stage's files or the repository's lock."""


def reproduce(folder: Path, stage: str) -> bool:
    """Bring one stage of ``folder``/dvc.yaml up to date and say whether it had to run.

    Raises:
        StageBusyError: Another run works on the same files; trying again later helps.
        Exception: Whatever the stage itself raised, with the stage's name as a note.
    """
    logging.getLogger("dvc").setLevel(logging.WARNING)  # at INFO it advises on git at every stage
    for _ in range(2):  # files of DVC's own
        try:
            return _reproduce(folder, stage)
        except (ParseError, YAMLValidationError, RWLockFileCorruptedError, RWLockFileFormatError) as error:
            if not _mended(folder, error):
                raise
    return _reproduce(folder, stage)


def _reproduce(folder: Path, stage: str) -> bool:
    with (
        contextlib.chdir(folder),
        Repo() as repo,
        patch.object(dvc.stage.run, "_run", _run_here),
        patch.object(dvc.utils.serialize._common, "_dump_data", _dump_whole),
        patch.object(dvc_objects.fs.system, "reflink", _clone_whole),
        patch.object(dvc.rwlock, "_edit_rwlock", _edit_locks_whole),
    ):
        try:
            return bool(Repo.reproduce(repo, f"dvc.yaml:{stage}", single_item=True))
        except LockError as error:
            raise StageBusyError(f"stage {stage}: {error}") from error
        except ReproductionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, LockError):
                raise StageBusyError(f"stage {stage}: {cause}") from cause
            cause.add_note(f"in stage {stage} of {folder / 'dvc.yaml'}")
            raise cause from cause.__cause__


def _mended(folder: Path, error: Exception) -> bool:
    """Whether what DVC could not read was a file that it makes itself, and is now out of the way."""
    if isinstance(error, RWLockFileCorruptedError | RWLockFileFormatError):
        with contextlib.chdir(folder), Repo() as repo:
            damaged = Path(str(repo.tmp_dir), "rwlock")
    else:
        damaged = folder / "dvc.lock"
        if "dvc.lock" not in str(error):
            return False
    aside = damaged.with_name(damaged.name + ".damaged")
    damaged.replace(aside)
    print(f"{damaged} was damaged, and is made again; see {aside}", file=sys.stderr, flush=True)
    return True


def _dump_whole(path: str, data: Any, dumper: Callable[..., Any], fs: Any = None, **settings: Any) -> None:
    """Stand in for DVC's writing of a YAML or JSON file."""
    text = io.StringIO()
    dumper(data, text, **settings)
    atomic.write(Path(path), text.getvalue())


_clone = dvc_objects.fs.system.reflink  # which makes the file, clones into it, and removes it if it cannot


def _clone_whole(source: str, target: str) -> None:
    """Stand in for DVC's cloning of a file: beside the target, as DVC names what is half done, then moved."""
    beside = Path(target).with_name(tmp_fname())
    _clone(source, str(beside))
    beside.replace(target)


_edit_locks = dvc.rwlock._edit_rwlock


def _edit_locks_whole(folder: str, fs: Any, hardlink: bool) -> contextlib.AbstractContextManager[Any]:
    """Stand in for DVC's reading and writing of the list of locked paths."""
    return _edit_locks(folder, _Whole(fs), hardlink)


@dataclass(frozen=True)
class _Whole:
    """A file system of DVC's, as far as its list of locks needs one, in which files appear whole."""

    fs: Any

    def join(self, *parts: str) -> str:
        return self.fs.join(*parts)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", encoding: str = "utf-8") -> Iterator[IO[str]]:
        if mode == "w":
            text = io.StringIO()
            yield text
            atomic.write(Path(path), text.getvalue())
        else:
            with self.fs.open(path, mode, encoding=encoding) as file:
                yield file


def _run_here(executable: str | None, cmd: str, **kwargs: Any) -> None:
    """Stand in for DVC's subprocess: `python -m flows.stages.NAME --key value` becomes a call of its main."""
    python, flag, module, *arguments = shlex.split(cmd)
    if (python, flag) != ("python", "-m") or not module.startswith("flows.stages."):
        raise ValueError(
            f"dvc.yaml: the command {cmd!r} is not `python -m flows.stages.NAME ...`; the flow cannot run it."
        )
    with contextlib.chdir(kwargs["cwd"]):
        importlib.import_module(module).main(arguments)
