"""Learn the byte-pair merges of the pocket tokenizer.

``medfocus/configs/bpe_pocket.txt.gz`` holds the merges for the words in
``medfocus/configs/words_pocket.txt``.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return merges that make each of ``words`` (lower case a-z) one token, the most frequent pair first.

    Each word counts once, and the alphabet breaks ties, so equal words give equal merges. A word outside of
    ``words`` becomes several tokens, at worst its bytes. Source: Sennrich et al., arXiv 1508.07909.
    """
    pieces = [(*word[:-1], word[-1] + "</w>") for word in set(words)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        most = max(counts.values())
        merges.append(min(pair for pair, count in counts.items() if count == most))
        merged = (_merge(word, merges[-1]) for word in pieces)
        pieces = [word for word in merged if len(word) > 1]
    return merges


def write_merges(words: Iterable[str], path: Path) -> int:
    """Write ``learn_merges(words)`` for open_clip's SimpleTokenizer; return the vocabulary's size."""
    merges = learn_merges(words)
    text = "\n".join(["#version: words_pocket.txt", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 2 * 256 + len(merges) + 2  # bytes inside and at the end of a word, merges, start, end


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
