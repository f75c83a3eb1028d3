"""Define the type of a phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Phantom:
    """A drawn image and its ground truth."""

    image: np.ndarray  # (H, W) uint8 grey
    region: np.ndarray  # (H, W) bool, the lesion; all False for a class without one
    modality: str  # a key of MODALITIES
    label: str  # one of MODALITIES[modality]
    findings: dict[str, str]  # words for captions: "finding", "region", "side", "size", ...
    parts: dict[str, np.ndarray]  # anatomy, name -> (H, W) bool: "left lung", "heart", "brain", ...
