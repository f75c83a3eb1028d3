"""The terminal output of the commands: tables, progress bars, one line for each fault, exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import typer

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR_AFTER = 2  # seconds; shorter work shows no bar
_WIDTH = 160  # characters of a table in a file or a pipe


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Run a command's work and print a fault as one line instead of a traceback.

    The exit code is 1 after a fault and 130 after Ctrl-C. Typer handles wrong usage, with exit code 2.
    """
    _prepare()
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        from flows.operations.failures import EXIT_INTERRUPTED, INTERRUPTED

        tell(INTERRUPTED)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        tell(sentence(error))
        raise typer.Exit(1) from error


def check_choice(value: str | None, choices: Any, option: str) -> None:
    """Raise BadParameter unless ``value`` is None or among the values of a Literal."""
    if value is not None and value not in get_args(choices):
        raise typer.BadParameter(f"{value!r} is none of {', '.join(get_args(choices))}.", param_hint=option)


def tell(text: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"medfocus: {text}", file=sys.stderr)


def sentence(error: Exception) -> str:
    """Return an error as one line: this project's errors as they are, others with their class."""
    from flows.operations.failures import explained
    from flows.operations.locks import JobRunningError
    from medfocus.storage.redaction import unredacted

    cause = unredacted(error)
    is_ours = isinstance(cause, ValueError | JobRunningError | OSError)
    if is_ours and getattr(cause, "errno", None) is None:
        return str(cause)
    return explained(cause)


def bar(total: int, work: str, unit: str = "image") -> tqdm[NoReturn]:
    """Return a progress bar. It stays hidden during short work, and in a file or a pipe."""
    from tqdm import tqdm

    return tqdm(total=total, desc=work, unit=unit, delay=_BAR_AFTER, disable=None, dynamic_ncols=True)


@contextlib.contextmanager
def waiting(work: str) -> Iterator[None]:
    """Show a spinner with a word for the work, except in a file or a pipe."""
    from rich.console import Console

    with Console(stderr=True).status(f"{work} ...") if sys.stderr.isatty() else contextlib.nullcontext():
        yield


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table as wide as the terminal, or 160 characters wide in a file or a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # without markup, because a name may contain brackets
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(shown)


def project() -> Path:
    """Return the project around the working directory. Raises FileNotFoundError if there is none."""
    from flows.study.study import find_home

    return find_home(Path.cwd())


def _prepare() -> None:
    # DVC runs the stages as `python -m flows...`, which must find this environment's Python.
    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    with contextlib.suppress(FileNotFoundError):
        os.environ.setdefault("PREFECT_HOME", str(project() / ".prefect"))
