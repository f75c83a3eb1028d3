"""Errors for files that hold no usable image."""

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
        self.kind: ImageFault = kind
        self.name, self.fault, self.fix = name, fault, fix

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, ImageFault, str, str]]:
        """Return the arguments, so that a worker process can send the error back."""
        return type(self), (self.name, self.kind, self.fault, self.fix)


class TooLargeError(ImageError):
    """A file above a limit of ``medfocus.images.decode``; the file may be sound."""


def too_many_pixels(name: str, count: str, most: int) -> TooLargeError:
    """Return the error for an image with ``count``, such as "9000 x 9000 pixels", above ``most`` pixels."""
    fault = f"has {count}; the limit is {most // 1_000_000} megapixels"
    return TooLargeError(name, "too many pixels", fault, "Scale it down or cut it into tiles, or remove it.")


def unpacks_too_large(name: str, most: int) -> TooLargeError:
    """Return the error for a compressed file that unpacks to more than ``most`` bytes."""
    fault = f"unpacks to more than {most // 1_000_000} MB, the limit"
    return TooLargeError(name, "file too large", fault, "Export it smaller, or remove it.")


def not_finite(name: str) -> ImageError:
    """Return the error for an image with NaN or infinite values."""
    fix = "Replace them and export it again."
    return ImageError(name, "values not finite", "holds values that are not finite", fix)
