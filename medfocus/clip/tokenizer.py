"""Build the tokenizer of the pocket CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer

CONFIGS = Path(__file__).parents[1] / "configs"


def pocket_tokenizer() -> SimpleTokenizer:
    """Build open_clip's tokenizer with the byte-pair merges of this package."""
    from open_clip import SimpleTokenizer

    context = json.loads((CONFIGS / "clip_pocket.json").read_text())["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(CONFIGS / "bpe_pocket.txt.gz"), context_length=context)
