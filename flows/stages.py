"""Run a DVC stage inside this process.

DVC alone decides whether a stage is stale, locks its paths, keeps its run cache and writes
dvc.lock; only the subprocess is saved, which would spend 10 to 20 s on importing torch, open_clip
and MLflow for every stage. The seam is one private function of DVC, pinned with it; a contract
test holds that what ran here leaves `dvc status` clean.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dvc.stage.run
from dvc.exceptions import ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo


class StageBusyError(RuntimeError):
    """Another process holds the stage's files or the repository's lock."""


def reproduce(folder: Path, stage: str) -> bool:
    """Bring one stage of ``folder``/dvc.yaml up to date and say whether it had to run.

    Raises:
        StageBusyError: Another run works on the same files; trying again later helps.
        Exception: Whatever the stage itself raised, with the stage's name as a note.
    """
    logging.getLogger("dvc").setLevel(logging.WARNING)  # at INFO it advises on git at every stage
    with contextlib.chdir(folder), Repo() as repo, patch.object(dvc.stage.run, "_run", _run_here):
        try:
            return bool(Repo.reproduce(repo, f"dvc.yaml:{stage}", single_item=True))
        except LockError as error:
            raise StageBusyError(f"stage {stage}: {error}") from error
        except ReproductionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, LockError):
                raise StageBusyError(f"stage {stage}: {cause}") from cause
            cause.add_note(f"in stage {stage} of {folder / 'dvc.yaml'}")
            raise cause from None


def _run_here(executable: str | None, cmd: str, **kwargs: Any) -> None:
    """Stand in for DVC's subprocess: `python -m flows.NAME --key value` becomes a call of its main."""
    python, flag, module, *arguments = shlex.split(cmd)
    if (python, flag) != ("python", "-m") or not module.startswith("flows."):
        raise ValueError(
            f"dvc.yaml: the command {cmd!r} is not `python -m flows.NAME ...`; the flow cannot run it."
        )
    with contextlib.chdir(kwargs["cwd"]):
        importlib.import_module(module).main(arguments)
