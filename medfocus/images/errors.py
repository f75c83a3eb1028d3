"""Errors of files that hold no usable image."""

from __future__ import annotations

from typing import Literal

ImageFault = Literal[
    "empty file",
    "not a regular file",
    "cannot be read",
    "file too large",
    "unknown image format",
    "unsupported encoding",
    "truncated file",
    "cannot be decoded",
    "too many pixels",
    "no image in the file",
    "no such frame",
    "several images in one file",
    "values not finite",
    "constant slices",
]


class ImageError(ValueError):
    """A file that holds no usable image: its name, the kind of fault, the fault, and the fix.

    The kind names no file and no patient, so that reports may count and show it.
    """

    def __init__(self, name: str, kind: ImageFault, fault: str, fix: str) -> None:
        super().__init__(f"{name}: {fault}. {fix}")
        self.name, self.kind, self.fault, self.fix = name, kind, fault, fix

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, ImageFault, str, str]]:
        """Return the arguments, so that a worker process can send the error back."""
        return type(self), (self.name, self.kind, self.fault, self.fix)


class TooLargeError(ImageError):
    """A file above a limit of ``medfocus.images.decode``; the file may be sound."""
