"""Decode DICOM frames with GDCM in a separate process; see ``medfocus.images.gdcm_worker``."""

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

_TIMEOUT = 60  # seconds per frame; a large frame takes a few


class GdcmCrash(RuntimeError):
    """The GDCM process died or was killed while decoding a frame."""


class Gdcm:
    """The GDCM process: started on first use, used by one thread at a time, and not shared across a fork."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def decode(self, stream: bytes, **options: Any) -> tuple[np.ndarray, str]:
        """Decode a compressed frame as pydicom's decoder does; return pixels and photometric interpretation.

        Raises ValueError if GDCM refuses the frame, and GdcmCrash if the process does not survive it.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(_TIMEOUT, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps({**options, "length": len(stream)}).encode() + b"\n" + stream)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            pixels = process.stdout.read(answer["length"])
        except (OSError, ValueError) as error:  # the pipe is closed, or the answer is incomplete
            self.close()
            raise GdcmCrash(
                f"GDCM crashed on its compressed pixels, or took more than {_TIMEOUT} s"
            ) from error
        finally:
            watch.cancel()
        if "error" in answer:
            raise ValueError(answer["error"])
        array = np.frombuffer(bytearray(pixels), answer["dtype"]).reshape(answer["shape"])
        return array, answer["interpretation"]

    def close(self) -> None:
        """End the GDCM process, unless it belongs to the parent of a fork."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # the pipe may hold unsent input
                if pipe is not None:
                    pipe.close()
        process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            from medfocus.images import gdcm_worker  # imports pydicom

            # -P: do not import from the folder of the worker.
            command = [sys.executable, "-P", gdcm_worker.__file__]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return self._process
