"""The methods a study can name. A new one is a file that cites its paper and a line here."""

from __future__ import annotations

from medfocus.methods.clip import ClipFewShot, ClipLinearProbe, ClipZeroShot
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.methods.pixels import Pixels
from medfocus.methods.protocol import Method, Support

METHODS = {
    "pixels": Pixels,
    "clip-zero-shot": ClipZeroShot,
    "clip-linear-probe": ClipLinearProbe,
    "clip-few-shot": ClipFewShot,
    "medfocusclip": MedFocusClip,
}

__all__ = ["METHODS", "Method", "Support"]
