"""Patients' ids -> pseudonyms: one patient has the same one wherever the salt is the same.

Who has the salt can find the pseudonym of an id that he guesses, so the salt stays where the images are.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from functools import cached_property
from pathlib import Path

VARIABLE = "MEDFOCUS_PATIENT_SALT"
FILE = ".patient-salt"  # in the project's folder; no cache, for without it every patient gets another name
_LEAST = 16  # characters
_DIGITS = 16  # of a pseudonym


class Salt:
    """The secret that pseudonyms are made with; it is looked up, or made, when the first one is asked for."""

    def __init__(self, file: Path | None) -> None:
        """The environment's MEDFOCUS_PATIENT_SALT goes first; without either it lives for this process."""
        self._file = file

    def pseudonym(self, patient_id: str) -> str:
        """16 hex digits, by HMAC-SHA256; "" for the id "". Raises ValueError for a salt that is too short."""
        if not patient_id:
            return ""
        return hmac.new(self._value, patient_id.encode(), hashlib.sha256).hexdigest()[:_DIGITS]

    @cached_property
    def fingerprint(self) -> str:
        """What tells one salt from another without telling it."""
        return hmac.new(self._value, b"fingerprint", hashlib.sha256).hexdigest()

    @cached_property
    def _value(self) -> bytes:
        if given := os.environ.get(VARIABLE):
            return _checked(given, f"the environment's {VARIABLE}")
        if self._file is None:
            return secrets.token_bytes(32)
        try:
            if not self._file.exists():
                _make(self._file)
            text = self._file.read_text(encoding="utf-8")
        except OSError as error:  # which is not to be taken for that of an image
            raise ValueError(
                f"{self._file}: the salt of patients' pseudonyms cannot be read or made ({error.strerror}). "
                f"Give access to it, or set {VARIABLE}."
            ) from error
        return _checked(text.strip(), str(self._file))


def _checked(salt: str, place: str) -> bytes:
    if len(salt) < _LEAST:
        raise ValueError(
            f"{place}: the salt has {len(salt)} characters, and {_LEAST} are needed to keep patients' ids "
            "secret; give a longer one that nobody can guess."
        )
    return salt.encode()


def _make(file: Path) -> None:
    """Write a new salt for its owner alone, whole or not at all; of several processes one wins."""
    descriptor, beside = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")  # of mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            opened.write(secrets.token_hex(32) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        _move(beside, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def _move(beside: str, file: Path) -> None:
    try:
        os.link(beside, file)  # unlike a move it fails where another process was first
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not file.exists():
            os.replace(beside, file)
