"""Errors without their text for what keeps them: Prefect and MLflow write down what a run raised.

The text of an error names files, and the names of medical images name patients. Whoever runs a study needs
it, on the terminal; a database that is backed up, shared and shown on a page gets kind and place alone.
"""

from __future__ import annotations

import functools
import linecache
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")

_OURS = ("medfocus", "flows")


class RedactedError(RuntimeError):
    """Stands for an error, without its text; in the process that raised it, ``error`` is that one."""

    def __init__(self, told: str, error: Exception | None = None) -> None:
        super().__init__(told)
        self.error = error

    def __reduce__(self) -> tuple[type[RedactedError], tuple[str]]:
        """Without ``error``: Prefect keeps what a flow raised as a pickle in its home."""
        return type(self), (str(self),)


def kind_and_place(error: BaseException) -> str:
    """Such as "ImageError at medfocus.images.decode:72": this project's innermost line before the error."""
    walked = traceback.walk_tb(error.__traceback__)
    frames = [(str(frame.f_globals.get("__name__", "?")), line) for frame, line in walked]
    ours = [place for place in frames if place[0].partition(".")[0] in _OURS]
    kind = type(error).__name__
    if not frames:
        return kind
    module, line = (ours or frames)[-1]
    return f"{kind} at {module}:{line}"


def in_full(error: BaseException) -> str:
    """An error as the terminal has it: with the way to it, unless this project raised it on purpose."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if frames:
        frame, number = frames[-1]
        ours = str(frame.f_globals.get("__name__", "?")).partition(".")[0] in _OURS
        line = linecache.getline(frame.f_code.co_filename, number)
        if ours and line.lstrip().startswith("raise "):
            return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(error))


def redacted(work: Callable[Given, Made]) -> Callable[Given, Made]:
    """Have ``work`` tell its errors on the terminal, in full, and raise ``RedactedError`` in their place.

    It stands below ``@task`` and ``@flow``, so that they see the latter alone.
    """

    @functools.wraps(work)
    def careful(*given: Given.args, **named: Given.kwargs) -> Made:
        try:
            return work(*given, **named)
        except RedactedError:
            raise
        except Exception as error:
            print(in_full(error), end="", file=sys.stderr)
            told = RedactedError(f"{kind_and_place(error)}; its text is on the terminal", error)
        raise told  # out here it has no context, which a log would print

    return careful


def unredacted(error: BaseException) -> BaseException:
    """The error behind a ``RedactedError``, where it is at hand; any other as it is."""
    return error.error or error if isinstance(error, RedactedError) else error
