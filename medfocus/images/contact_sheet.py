"""Arrange several images with captions on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CAPTION_HEIGHT = 14  # pixels under each tile
_GAP = 4  # pixels between tiles


def montage(tiles: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """Arrange tiles (h, w, 3) uint8 of any size, row by row, on one dark grey sheet (H, W, 3) uint8.

    A caption wider than its tile is cut. Raises ValueError without tiles, or if the numbers of captions and
    tiles differ.
    """
    if not tiles or columns < 1:
        raise ValueError(f"montage: {len(tiles)} tiles in {columns} columns; give at least one of each.")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(
            f"montage: {len(captions)} captions for {len(tiles)} tiles; give one per tile or None."
        )
    tile_height = max(tile.shape[0] for tile in tiles)
    tile_width = max(tile.shape[1] for tile in tiles)
    columns = min(columns, len(tiles))
    row_height = tile_height + _GAP + (_CAPTION_HEIGHT if captions is not None else 0)
    size = (columns * (tile_width + _GAP) + _GAP, math.ceil(len(tiles) / columns) * row_height + _GAP)
    sheet = Image.new("RGB", size, (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x, y = _GAP + column * (tile_width + _GAP), _GAP + row * row_height
        sheet.paste(Image.fromarray(tile), (x, y))
        if captions is not None:
            caption = _shortened(captions[i], tile_width, font)
            draw.text((x, y + tile_height + 1), caption, fill=(230, 230, 230), font=font)
    return np.asarray(sheet)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
