"""Check the parameters of ``estimator.MedFocusCLIP``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import check_random_state

from medfocus.clip.build import RESIZES
from medfocus.clip.regions import REGIONS
from medfocus.focus.modes import FOCUS
from medfocus.focus.view import FILLS
from medfocus.learning.schedules import SCHEDULES
from medfocus.masks.settings import SETTINGS
from medfocus.methods import METHODS
from medfocus.serving import defaults

if TYPE_CHECKING:
    from medfocus.serving.estimator import MedFocusCLIP


def check(model: MedFocusCLIP) -> dict[str, Any]:
    """Return all settings of the method. Raises ValueError for a parameter out of range."""
    modes = (*FOCUS, *REGIONS)
    for name, value, known in (
        ("method", model.method, METHODS),
        ("schedule", model.schedule, SCHEDULES),
        ("focus", model.focus, modes),
        ("segmenter", model.segmenter, SETTINGS),
        ("resize", model.resize, RESIZES),
        ("fill", model.fill, FILLS),
    ):
        if value not in known:
            raise ValueError(f"MedFocusCLIP: {name} is {value!r}; use one of {', '.join(known)}.")
    for name, value, least in (
        ("augmented", model.augmented, 0),
        ("batch_size", model.batch_size, 1),
        ("folds", model.folds or 0, 0),
    ):
        if value < least:
            raise ValueError(f"MedFocusCLIP: {name} is {value}; use {least} or more.")
    if not 0.5 <= model.confidence < 1:
        raise ValueError(f"MedFocusCLIP: confidence is {model.confidence}; use 0.5 or more, and less than 1.")
    return defaults.changed_settings(model.method, model.schedule, model.settings or {})


def seed(random_state: int | np.random.RandomState | None) -> int:
    """Return an int as it is; draw a seed from another random state."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))
