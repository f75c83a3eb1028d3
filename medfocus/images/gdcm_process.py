"""Frames of DICOM that only GDCM decodes, decoded in a process apart; see ``medfocus.images.gdcm_worker``."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np

_SECONDS = 60  # that a frame may take; a large one takes a few


class Broken(RuntimeError):
    """The process ended, or had to be ended, while it decoded."""


class Gdcm:
    """The process, started when it is needed; for one thread at a time. A fork starts its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def decode(self, stream: bytes, **options: Any) -> tuple[np.ndarray, str]:
        """One compressed frame -> its pixels as pydicom's decoder gives them, and how they mean colours.

        Raises ValueError for what GDCM refuses, and Broken where it was the end of it.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps({**options, "length": len(stream)}).encode() + b"\n" + stream)
            process.stdin.flush()
            told = json.loads(process.stdout.readline())
            pixels = process.stdout.read(told["length"])
        except (OSError, ValueError) as error:  # a pipe whose other end is gone, or half an answer
            self.close()
            raise Broken(
                f"GDCM broke down over its compressed pixels, or took more than {_SECONDS} s"
            ) from error
        finally:
            watch.cancel()
        if "error" in told:
            raise ValueError(told["error"])
        array = np.frombuffer(bytearray(pixels), told["dtype"]).reshape(told["shape"])
        return array, told["interpretation"]

    def close(self) -> None:
        """End the process, if it is this one's."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what could not be written before it ended
                if pipe is not None:
                    pipe.close()
        process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            from medfocus.images import gdcm_worker  # imports pydicom

            # -P: the worker imports nothing from its folder.
            command = [sys.executable, "-P", gdcm_worker.__file__]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return self._process
