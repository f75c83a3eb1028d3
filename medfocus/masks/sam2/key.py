"""The key of a segmenter that stands on another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from medfocus.masks.segmenter import settings_key


def informed_key(module: str, settings: Mapping[str, object]) -> str:
    """sha256 hex over settings (JSON types), the masks' common code and the source file ``module``.

    One file a segmenter: a change in one leaves the masks of the other where they are.
    """
    path = Path(module)
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    return settings_key(path.stem, {**settings, "module": own})
