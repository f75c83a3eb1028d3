"""MedFocusCLIP: few-shot classification of medical images with region focus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfocus.serving.estimator import MedFocusCLIP

__version__ = "0.1.0"
__all__ = ["MedFocusCLIP", "__version__"]


def __getattr__(name: str) -> object:
    """The classifier, imported when it is first asked for: with it come seconds of torch."""
    if name == "MedFocusCLIP":
        from medfocus.serving.estimator import MedFocusCLIP

        return MedFocusCLIP
    raise AttributeError(f"module 'medfocus' has no attribute {name!r}")
