"""The tokenizer of the pocket CLIP: open_clip's own, over merges that this package brings."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer

CONFIGS = Path(__file__).parents[1] / "configs"


def pocket_tokenizer() -> SimpleTokenizer:
    """The pocket model's tokenizer: open_clip's, over the merges that this package brings."""
    from open_clip import SimpleTokenizer

    context = json.loads((CONFIGS / "clip_pocket.json").read_text())["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(CONFIGS / "bpe_pocket.txt.gz"), context_length=context)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of ``words`` (lower case a-z) a single token, commonest pair first.

    Each word counts once and ties go by the alphabet, so the same words give the same merges. Words that are
    not among them still have tokens: their parts, at worst their bytes. Source: Sennrich et al., arXiv
    1508.07909.
    """
    pieces = [(*word[:-1], word[-1] + "</w>") for word in set(words)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        most = max(counts.values())
        merges.append(min(pair for pair, count in counts.items() if count == most))
        merged = (_merge(word, merges[-1]) for word in pieces)
        pieces = [word for word in merged if len(word) > 1]  # the others are whole
    return merges


def write_merges(words: Iterable[str], path: Path) -> int:
    """Write ``learn_merges(words)`` as open_clip's SimpleTokenizer reads them; return the vocabulary's size.

    ``medfocus/configs/bpe_pocket.txt.gz`` is made so out of the words in ``words_pocket.txt`` beside it.
    """
    merges = learn_merges(words)
    text = "\n".join(["#version: words_pocket.txt", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 2 * 256 + len(merges) + 2  # every byte inside and at the end of a word, the merges, start and end


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in word:
        return word
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)
