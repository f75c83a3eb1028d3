"""Replace patient ids by pseudonyms; a patient has the same pseudonym wherever the salt is the same.

Anyone who has the salt can compute the pseudonym of a guessed id, so the salt must stay with the images.
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
FILE = ".patient-salt"  # in the project's folder, not in a cache: a new salt changes all pseudonyms
_LEAST = 16  # characters
_DIGITS = 16  # hex digits of a pseudonym


class Salt:
    """The secret behind pseudonyms; it is read or created at the first pseudonym."""

    def __init__(self, file: Path | None) -> None:
        """Use the environment variable MEDFOCUS_PATIENT_SALT, else ``file``, else a salt of this process."""
        self._file = file

    def pseudonym(self, patient_id: str) -> str:
        """Return 16 hex digits by HMAC-SHA256; "" for the id "". Raises ValueError for a short salt."""
        if not patient_id:
            return ""
        return hmac.new(self._value, patient_id.encode(), hashlib.sha256).hexdigest()[:_DIGITS]

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the salt without revealing it."""
        return hmac.new(self._value, b"fingerprint", hashlib.sha256).hexdigest()

    @cached_property
    def _value(self) -> bytes:
        if salt := os.environ.get(VARIABLE):
            return _checked(salt, f"the environment variable {VARIABLE}")
        if self._file is None:
            return secrets.token_bytes(32)
        try:
            if not self._file.exists():
                _make(self._file)
            text = self._file.read_text(encoding="utf-8")
        except OSError as error:  # not OSError, which callers treat as a fault of an image
            raise ValueError(
                f"{self._file}: the salt of patient pseudonyms cannot be read or created ({error.strerror}). "
                f"Grant access to it, or set {VARIABLE}."
            ) from error
        return _checked(text.strip(), str(self._file))


def _checked(salt: str, place: str) -> bytes:
    if len(salt) < _LEAST:
        raise ValueError(
            f"{place}: the salt has {len(salt)} characters, but needs {_LEAST} to keep patient ids secret. "
            "Give a longer one that nobody can guess."
        )
    return salt.encode()


def _make(file: Path) -> None:
    """Create a salt file atomically, readable by its owner only; the first of several processes wins."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            opened.write(secrets.token_hex(32) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        _move(temporary, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _move(temporary: str, file: Path) -> None:
    try:
        os.link(temporary, file)  # unlike a move, a link fails if another process was first
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not file.exists():
            os.replace(temporary, file)
