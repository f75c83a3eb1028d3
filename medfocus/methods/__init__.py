"""The classification methods that a study can name, with one paper per module.

``METHODS`` maps the name in params.yaml to the class, and ``fusion`` holds the equations of MedFocusCLIP. To
add a method, write a module that cites its paper, and add a line here. The room imports ``learning``,
``clip`` and ``storage``. Methods import neither each other nor the segmenters of ``masks``.
"""

from __future__ import annotations

from medfocus.learning.method import Method
from medfocus.methods.backbone import Backbone
from medfocus.methods.biomedcoop import BiomedCoOp
from medfocus.methods.clap import Clap
from medfocus.methods.clip import ClipFewShot, ClipLinearProbe, ClipZeroShot
from medfocus.methods.clip_adapter import ClipAdapter
from medfocus.methods.clip_lora import ClipLora
from medfocus.methods.clip_svd import ClipSvd
from medfocus.methods.cocoop import CoCoOp
from medfocus.methods.coop import CoOp
from medfocus.methods.lp_plus_plus import LpPlusPlus
from medfocus.methods.medfocusclip import MedFocusClip
from medfocus.methods.nearest import NearestClassMean, NearestNeighbours
from medfocus.methods.pixels import Pixels, PixelsSvm
from medfocus.methods.slca import Slca
from medfocus.methods.ss_text import SsText
from medfocus.methods.tip_adapter import TipAdapter, TipAdapterF

METHODS: dict[str, type[Method]] = {
    "pixels": Pixels,
    "pixels-svm": PixelsSvm,
    "nearest-class-mean": NearestClassMean,
    "k-nn": NearestNeighbours,
    "clip-zero-shot": ClipZeroShot,
    "clip-linear-probe": ClipLinearProbe,
    "clip-few-shot": ClipFewShot,
    "clip-adapter": ClipAdapter,
    "clip-lora": ClipLora,
    "clip-svd": ClipSvd,
    "clap": Clap,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "biomedcoop": BiomedCoOp,
    "tip-adapter": TipAdapter,
    "tip-adapter-f": TipAdapterF,
    "lp++": LpPlusPlus,
    "ss-text": SsText,
    "medfocusclip": MedFocusClip,
    "slca": Slca,
    "resnet": Backbone,
}
