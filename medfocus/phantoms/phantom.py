"""What drawing a phantom gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Phantom:
    """A drawn image and everything that is known of it because it was drawn."""

    image: np.ndarray  # (H, W) uint8 grey
    region: np.ndarray  # (H, W) bool, the lesion; all False where the class has none
    modality: str  # a key of MODALITIES
    label: str  # one of MODALITIES[modality]
    findings: dict[str, str]  # "finding", "region", "side", "size", and what else a caption may say
    parts: dict[str, np.ndarray]  # anatomy, name -> (H, W) bool: "left lung", "heart", "brain", ...
