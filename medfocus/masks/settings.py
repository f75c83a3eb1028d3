"""Define the settings of the segmenters: everything that decides a mask, except weights and code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from medfocus.masks.candidates import Limits

STRATEGIES = ("interest", "automatic", "grid", "center", "box")


@dataclass(frozen=True)
class OtsuSettings:
    """Settings of ``OtsuSegmenter``."""

    kind: ClassVar[str] = "otsu"

    keep: int = 1  # distinct regions that a mask unites: 2 for the lungs of a chest X-ray
    min_area: float = 0.01  # share of the image
    max_area: float = 0.70  # share of the image
    max_overlap: float = 0.3  # of the smaller of two distinct regions

    def __post_init__(self) -> None:
        """Raise ValueError for ``keep`` out of range."""
        _check_counts(keep=self.keep)

    @property
    def limits(self) -> Limits:
        """Return the limits of a candidate."""
        return Limits(self.min_area, self.max_area, min_iou=0.0, min_stability=0.0)


@dataclass(frozen=True)
class Sam2Settings:
    """Settings of ``Sam2Segmenter``."""

    kind: ClassVar[str] = "sam2"

    config: str  # see ``load_predictor``
    checkpoint: str  # see ``load_predictor``
    image_size: int | None  # pixels per side that the model sees; None: as in the configuration
    strategy: str  # one of STRATEGIES
    points_per_side: int = 4  # of the strategies "automatic" and "grid"
    keep: int = 1  # distinct regions that a mask unites: 2 for the lungs of a chest X-ray
    min_area: float = 0.01  # share of the image
    max_area: float = 0.70  # share of the image
    # SAM2's generator uses 0.8 and 0.95 for photographs. Here the score ranks the candidates, and the two
    # thresholds only exclude noise.
    min_iou: float = 0.7
    min_stability: float = 0.85
    max_overlap: float = 0.3  # of the smaller of two distinct regions
    box_side: float = 1.0  # of the strategy "box": side of the box as a share of the image's side
    follow_edges: bool = False  # move the outline of a mask to the image's edges

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown strategy, a number out of range or a contradiction."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"Unknown mask strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}.")
        _check_counts(points_per_side=self.points_per_side, keep=self.keep)
        if not 0 < self.box_side <= 1:
            raise ValueError(f"box_side is {self.box_side}; use a share of the image in (0, 1].")
        if self.follow_edges and self.strategy == "automatic":
            raise ValueError(
                "follow_edges does not work with the strategy 'automatic', which runs SAM2's own generator. "
                "Set follow_edges to false, or use the strategy 'grid'."
            )

    @property
    def limits(self) -> Limits:
        """Return the limits of a candidate."""
        return Limits(self.min_area, self.max_area, self.min_iou, self.min_stability)


SegmenterSettings = OtsuSettings | Sam2Settings
SETTINGS: dict[str, type[SegmenterSettings]] = {"otsu": OtsuSettings, "sam2": Sam2Settings}


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; use 1 or more.")
