"""How the commands speak: a table, a bar, one line a fault, and an exit code that says how it went."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT
_PATIENCE = 2  # seconds; what is done by then shows no bar
_WIDTH = 160  # characters of a table in a file or a pipe
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Around what a command does: quiet libraries, and a fault in a sentence and not in a traceback.

    Ends the command with 1 after a fault and with 130 after Ctrl-C; wrong usage is typer's, with 2.
    """
    _prepare()
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        tell("interrupted. What was finished is kept.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        tell(sentence(error))
        raise typer.Exit(1) from error


def tell(text: str) -> None:
    """A line about the command's work, on stderr, beside a bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"medfocus: {text}", file=sys.stderr)


def sentence(error: Exception) -> str:
    """What went wrong: this project's own errors name place, fault and fix, others are named by kind."""
    from flows.operations.jobs import JobRunningError, explained
    from medfocus.storage.redaction import unredacted

    told = unredacted(error)
    own = isinstance(told, ValueError | JobRunningError | OSError)
    if own and getattr(told, "errno", None) is None:
        return str(told)
    return explained(told)


def bar(total: int, doing: str, unit: str = "image") -> tqdm[NoReturn]:
    """A bar with rate and time left; none in a file or a pipe, nor for what is done in a moment."""
    from tqdm import tqdm

    return tqdm(total=total, desc=doing, unit=unit, delay=_PATIENCE, disable=None, dynamic_ncols=True)


@contextlib.contextmanager
def waiting(doing: str) -> Iterator[None]:
    """A moving sign beside ``doing`` where there is no count; nothing in a file or a pipe."""
    from rich.console import Console

    with Console(stderr=True).status(f"{doing} ...") if sys.stderr.isatty() else contextlib.nullcontext():
        yield


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table; as wide as the terminal, and in a file or a pipe wide enough for a whole line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # as it stands: a name may have brackets
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(shown)


def project() -> Path:
    """The project around the working directory. Raises FileNotFoundError, with what to do."""
    from flows.study.study import find_home

    return find_home(Path.cwd())


def _prepare() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # The stages are `python -m flows...`: that has to be this environment's Python.
    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    with contextlib.suppress(FileNotFoundError):
        os.environ.setdefault("PREFECT_HOME", str(project() / ".prefect"))
