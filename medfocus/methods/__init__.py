"""The methods a study can name. A new one is a file that cites its paper and a line here."""

from __future__ import annotations

from medfocus.methods.clip import ClipFewShot, ClipLinearProbe, ClipZeroShot
from medfocus.methods.clip_adapter import ClipAdapter
from medfocus.methods.lp_plus_plus import LpPlusPlus
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.methods.nearest import NearestClassMean, NearestNeighbours
from medfocus.methods.pixels import Pixels, PixelsSvm
from medfocus.methods.protocol import Method, Support
from medfocus.methods.ss_text import SsText
from medfocus.methods.tip_adapter import TipAdapter, TipAdapterF

METHODS = {
    "pixels": Pixels,
    "pixels-svm": PixelsSvm,
    "nearest-class-mean": NearestClassMean,
    "k-nn": NearestNeighbours,
    "clip-zero-shot": ClipZeroShot,
    "clip-linear-probe": ClipLinearProbe,
    "clip-few-shot": ClipFewShot,
    "clip-adapter": ClipAdapter,
    "tip-adapter": TipAdapter,
    "tip-adapter-f": TipAdapterF,
    "lp++": LpPlusPlus,
    "ss-text": SsText,
    "medfocusclip": MedFocusClip,
}

__all__ = ["METHODS", "Method", "Support"]
