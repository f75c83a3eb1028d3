"""Run a DVC stage inside this process.

DVC itself decides whether a stage is stale, locks its paths, keeps its run cache and writes dvc.lock.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from dvc.exceptions import ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError
from dvc.utils.serialize import ParseError
from dvc.utils.strictyaml import YAMLValidationError

from flows.stages.dvc_patches import in_this_process, open_repo


class StageBusyError(RuntimeError):
    """Another process holds a lock on the stage's files or the repository."""


def reproduce(folder: Path, stage: str) -> bool:
    """Bring one stage of ``folder``/dvc.yaml up to date; return whether it had to run.

    Raises:
        StageBusyError: Another run works on the same files; try again later.
        Exception: The stage's own error, with the stage's name as a note.
    """
    logging.getLogger("dvc").setLevel(logging.WARNING)  # INFO prints advice about git at every stage
    with contextlib.chdir(folder), open_repo() as repo, in_this_process():
        for _ in ("dvc.lock", "rwlock"):
            try:
                return _reproduce(repo, stage)
            except (ParseError, YAMLValidationError) as error:
                if "dvc.lock" not in str(error):
                    raise
                _set_aside(Path("dvc.lock"))
            except (RWLockFileCorruptedError, RWLockFileFormatError):
                _set_aside(Path(str(repo.tmp_dir), "rwlock"))
        return _reproduce(repo, stage)


def _reproduce(repo: Repo, stage: str) -> bool:
    try:
        return bool(Repo.reproduce(repo, f"dvc.yaml:{stage}", single_item=True))
    except LockError as error:
        raise StageBusyError(f"stage {stage}: {error}") from error
    except ReproductionError as error:
        cause = error.__cause__ or error
        if isinstance(cause, LockError):
            raise StageBusyError(f"stage {stage}: {cause}") from cause
        cause.add_note(f"in stage {stage} of {Path('dvc.yaml').absolute()}")
        raise cause from cause.__cause__


def _set_aside(damaged: Path) -> None:
    """Rename a file that a killed `dvc repro` left half written, so that DVC writes it again.

    DVC restores the stages of a dvc.lock from its run cache.
    """
    old = damaged.with_name(damaged.name + ".damaged").absolute()
    damaged.replace(old)
    print(f"{damaged.absolute()} was damaged and is written again; see {old}", file=sys.stderr, flush=True)
