"""Redact errors before Prefect and MLflow store them.

The text of an error names files, and the names of medical image files may name patients. So only the terminal
of the person who runs a study shows the text. Databases, which are backed up and shared, store only the type
and the place of the error.
"""

from __future__ import annotations

import functools
import linecache
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_OURS = ("medfocus", "flows")


class RedactedError(RuntimeError):
    """An error without its text. In the process that raised it, ``error`` is the original error."""

    def __init__(self, text: str, error: Exception | None = None) -> None:
        super().__init__(text)
        self.error = error

    def __reduce__(self) -> tuple[type[RedactedError], tuple[str]]:
        """Leave ``error`` out, because Prefect stores the errors of flows as pickles."""
        return type(self), (str(self),)


def kind_and_place(error: BaseException) -> str:
    """Return the type and place of an error, such as "ImageError at medfocus.images.decode:72"."""
    stack = traceback.walk_tb(error.__traceback__)
    frames = [(str(frame.f_globals.get("__name__", "?")), line) for frame, line in stack]
    ours = [place for place in frames if place[0].partition(".")[0] in _OURS]
    kind = type(error).__name__
    if not frames:
        return kind
    module, line = (ours or frames)[-1]
    return f"{kind} at {module}:{line}"


def in_full(error: BaseException) -> str:
    """Format an error for the terminal, with a traceback unless this project raised it deliberately."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if frames:
        frame, number = frames[-1]
        ours = str(frame.f_globals.get("__name__", "?")).partition(".")[0] in _OURS
        line = linecache.getline(frame.f_code.co_filename, number)
        if ours and line.lstrip().startswith("raise "):
            return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(error))


def redacted(work: Callable[P, R]) -> Callable[P, R]:
    """Decorate ``work`` to print its errors in full on the terminal and to raise ``RedactedError`` instead.

    Apply it below ``@task`` and ``@flow``, so that these see only ``RedactedError``.
    """

    @functools.wraps(work)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except RedactedError:
            raise
        except Exception as error:
            print(in_full(error), end="", file=sys.stderr)
            replacement = RedactedError(f"{kind_and_place(error)}; its text is on the terminal", error)
        raise replacement  # outside the except block, so that no log prints the original error

    return wrapper


def unredacted(error: BaseException) -> BaseException:
    """Return the original error of a ``RedactedError``, if known; return any other error unchanged."""
    return error.error or error if isinstance(error, RedactedError) else error
