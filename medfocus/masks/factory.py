"""Build segmenters from settings. Importing this module loads no network library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from medfocus.masks.settings import OtsuSettings, Sam2Settings, SegmenterSettings

if TYPE_CHECKING:
    from torch import Tensor

    from medfocus.masks.sam2.retrieval import Rank
    from medfocus.masks.sam2.segmenter import Sam2Segmenter
    from medfocus.masks.segmenter import Segmenter


def build_segmenter(
    settings: SegmenterSettings,
    *,
    adapter: Mapping[str, Tensor] | None = None,
    rank: Rank | None = None,
    batch_size: int = 4,
    device: str = "cpu",
) -> Segmenter:
    """Build a segmenter.

    Args:
        settings: Settings of Otsu's threshold or of SAM2.
        adapter: State of a trained adapter; SAM2 then segments with ``AdapterSegmenter``.
        rank: Ranking of proposals; SAM2 then segments with ``RetrievalSegmenter``.
        batch_size: Images that SAM2 encodes at once. It does not change the key.
        device: Device of SAM2. It does not change the key.

    Raises:
        FileNotFoundError, ValueError: See ``load_predictor`` and the segmenters.
    """
    if isinstance(settings, OtsuSettings):
        from medfocus.masks.otsu import OtsuSegmenter

        return OtsuSegmenter(settings)
    sam2 = build_sam2(settings, batch_size=batch_size, device=device)
    if adapter is not None:
        from medfocus.masks.sam2.adapter import AdapterSegmenter

        return AdapterSegmenter(sam2, adapter)
    if rank is not None:
        from medfocus.masks.sam2.retrieval import RetrievalSegmenter

        return RetrievalSegmenter(sam2, rank)
    return sam2


def build_sam2(settings: Sam2Settings, *, batch_size: int = 4, device: str = "cpu") -> Sam2Segmenter:
    """Build SAM2's segmenter; for large images a ``FastSegmenter``, if it supports model and strategy."""
    from medfocus.masks.sam2.fast_segmenter import LEAST_SIZE, FastSegmenter, fits
    from medfocus.masks.sam2.segmenter import load_sam2

    sam2 = load_sam2(settings, batch_size=batch_size, device=device)
    return FastSegmenter(sam2) if sam2.model.image_size >= LEAST_SIZE and fits(sam2) else sam2
