"""Decode frames with GDCM. This script runs in its own process, because some broken frames crash GDCM.

It imports nothing of this project. A request is a line of JSON (options of pydicom's decoder) and a frame. An
answer is a line of JSON and the pixels. The script ends when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import BinaryIO

from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

MOST_MEMORY = 6_000_000_000  # bytes of address space


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the input ends."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError, ValueError, OSError):  # on Windows, or if a lower limit is set
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    while line := requests.readline():
        options = json.loads(line)
        stream = requests.read(options.pop("length"))
        pixels = b""
        try:
            decoder = get_decoder(options.pop("syntax"))
            array, meta = decoder.as_array(encapsulate([stream]), index=0, decoding_plugin="gdcm", **options)
            pixels = array.tobytes()
            answer = {
                "shape": array.shape,
                "dtype": array.dtype.str,
                "interpretation": str(meta["photometric_interpretation"]),
            }
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        answers.write(json.dumps({**answer, "length": len(pixels)}).encode() + b"\n" + pixels)
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
