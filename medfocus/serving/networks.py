"""CLIP and segmenters: each thread builds them once for all fits of a cross-validation."""

from __future__ import annotations

import threading
from functools import lru_cache

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.masks.factory import build_segmenter
from medfocus.masks.segmenter import Segmenter
from medfocus.masks.settings import SegmenterSettings
from medfocus.serving.defaults import default_params


def shared_clip(clip: str, pretrained: str, resize: str, device: str) -> ClipEncoder:
    """Return this thread's CLIP."""
    return _clip(clip, pretrained, resize, device, threading.get_ident())


def shared_segmenter(settings: SegmenterSettings, device: str) -> Segmenter:
    """Return this thread's segmenter."""
    return _segmenter(settings, device, threading.get_ident())


@lru_cache(maxsize=4)
def _clip(clip: str, pretrained: str, resize: str, device: str, thread: int) -> ClipEncoder:
    return build_clip(clip, pretrained, device, resize=resize)


@lru_cache(maxsize=4)
def _segmenter(settings: SegmenterSettings, device: str, thread: int) -> Segmenter:
    return build_segmenter(settings, batch_size=default_params()["masks"]["batch_size"], device=device)
