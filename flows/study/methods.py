"""The methods of a study, built from their checked settings in params.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from flows.study.params import Params
from medfocus.clip.regions import REGIONS
from medfocus.focus.controls import focus_of
from medfocus.learning.method import Method
from medfocus.learning.selection import Choice, candidates
from medfocus.methods import METHODS

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def build_method(params: Params, name: str, encoder: ClipEncoder | None, *, flip: bool = False) -> Method:
    """Build an unfitted method; without an encoder this only checks the hyperparameters.

    ``flip`` is that of the data set; see ``Method.flip``. If params.yaml lists several values to choose
    from, the method has the first one.

    Raises:
        ValueError: The name or a hyperparameter is unknown, missing or out of range.
    """
    kind, settings = params.method(name)
    if kind not in METHODS:
        raise ValueError(
            f"params.yaml: methods.{name} is not a method; use one of {', '.join(METHODS)}, or add "
            "'like: METHOD' for another row of one of them."
        )
    first = _candidates(params, name)[0]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in {**settings, **first}.items()}
    try:
        return METHODS[kind](cast("ClipEncoder", encoder), flip=flip, **settings)
    except TypeError as error:
        raise ValueError(f"params.yaml: methods.{name}: {error}.") from error


def check_towers(params: Params, encoder: ClipEncoder) -> None:
    """Raise ValueError if a method or a focus of the study needs something that the encoder's towers lack."""
    for name, modes in params.study.methods.items():
        for focus in modes:
            caller = f"params.yaml: study.methods.{name} with the focus {focus!r}"
            if (mode := focus_of(focus)) in REGIONS:
                encoder.require(REGIONS[mode].needs, caller)
            build_method(params, name, encoder).check_towers(caller)


def _candidates(params: Params, name: str) -> tuple[Mapping[str, Any], ...]:
    """Return the settings to select from inside the support; see ``selection.candidates``.

    Raises ValueError for an empty list, and for learning rates that are not numbers above 0.
    """
    settings = params.method(name)[1]
    try:
        found = candidates(settings)
    except ValueError as error:
        raise ValueError(f"params.yaml: methods.{name}.{error}") from error
    for rate in (one.get("lr", settings.get("lr", 1)) for one in found):
        if not isinstance(rate, int | float) or rate <= 0:
            raise ValueError(
                f"params.yaml: methods.{name}.lr is {settings['lr']!r}; give a number above 0, or a list of "
                "numbers from which cross-validation inside the support selects."
            )
    return found


def choice_of(params: Params, name: str) -> Choice | None:
    """Return the choice that a method's listed settings ask for; None if there is nothing to choose."""
    found = _candidates(params, name)
    return Choice(found, **dataclasses.asdict(params.choice)) if len(found) > 1 else None


def schedule_warning(params: Params) -> str:
    """Return a warning if other hyperparameters would fit the size of the study's CLIP, else ""."""
    fitting = "small" if params.clip.embedded else "published"
    other = dataclasses.replace(params, study=dataclasses.replace(params.study, schedule=fitting))
    rows = [name for name in params.study.methods if params.method(name) != other.method(name)]
    if not rows:
        return ""
    weights = "full-size weights" if params.clip.embedded else "the embedded models"
    return (
        f"params.yaml: study.schedule is {params.study.schedule}, for {weights}, but clip.model is "
        f"{params.clip.model}. If this is a mistake, set it to {fitting}; it changes {', '.join(rows)}."
    )
