"""Build the tokenizer of the pocket CLIP, and check that a tokenizer cuts no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer

CONFIGS = Path(__file__).parents[1] / "configs"


def pocket_tokenizer() -> SimpleTokenizer:
    """Build open_clip's tokenizer with the byte-pair merges of this package."""
    from open_clip import SimpleTokenizer

    context = json.loads((CONFIGS / "clip_pocket.json").read_text())["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(CONFIGS / "bpe_pocket.txt.gz"), context_length=context)


def check_lengths(tokenizer: Any, texts: list[str], model: str) -> None:
    """Raise ValueError if one of open_clip's tokenizers would cut a text for ``model``."""
    counts, longest = _lengths(tokenizer, texts)
    for text, count in zip(texts, counts, strict=True):
        if count > longest:
            raise ValueError(
                f"the prompt '{text}' has {count} tokens, and {model} reads at most {longest}. "
                "Shorten the template or the class name."
            )


def _lengths(tokenizer: Any, texts: list[str]) -> tuple[list[int], int]:
    """Return the number of tokens of each text, and the most that fit, both without special tokens."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context = tokenizer.context_length
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) for text in texts], context - 2  # the start and the end token
    assert isinstance(tokenizer, HFTokenizer)
    inner: Any = tokenizer.tokenizer
    cleaned = [tokenizer.clean_fn(text) for text in texts]
    ids = inner(cleaned, add_special_tokens=False, verbose=False)["input_ids"]
    special = 3 if tokenizer.tokenizer_mode == "clips" else inner.num_special_tokens_to_add()
    return [len(tokens) for tokens in ids], context - special
