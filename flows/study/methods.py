"""The methods of a study, built from their checked settings in params.yaml."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

from flows.study.params import Params
from medfocus.clip.regions import REGIONS
from medfocus.learning.method import Method
from medfocus.learning.selection import LearningRates
from medfocus.methods import METHODS

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def build_method(params: Params, name: str, encoder: ClipEncoder | None) -> Method:
    """Build an unfitted method; without an encoder this only checks the hyperparameters.

    If params.yaml lists several learning rates, the method has the first one.

    Raises:
        ValueError: The name or a hyperparameter is unknown, missing or out of range.
    """
    kind, settings = params.method(name)
    if kind not in METHODS:
        raise ValueError(
            f"params.yaml: methods.{name} is not a method; use one of {', '.join(METHODS)}, or add "
            "'like: METHOD' for another row of one of them."
        )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    if rates := learning_rates(params, name):
        settings["lr"] = rates[0]
    try:
        return METHODS[kind](cast("ClipEncoder", encoder), **settings)
    except TypeError as error:
        raise ValueError(f"params.yaml: methods.{name}: {error}.") from error


def check_towers(params: Params, encoder: ClipEncoder) -> None:
    """Raise ValueError if a method or a focus of the study needs something that the encoder's towers lack."""
    for name, modes in params.study.methods.items():
        for focus in modes:
            caller = f"params.yaml: study.methods.{name} with the focus {focus!r}"
            if focus in REGIONS:
                encoder.require(REGIONS[focus].needs, caller)
            build_method(params, name, encoder).check_towers(caller)


def learning_rates(params: Params, name: str) -> tuple[float, ...]:
    """Return the learning rates to select from inside the support; () for a method without a rate.

    Raises ValueError unless all are numbers above 0.
    """
    settings = params.method(name)[1]
    if "lr" not in settings:
        return ()
    written = settings["lr"]
    rates = tuple(written) if isinstance(written, list) else (written,)
    if not rates or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise ValueError(
            f"params.yaml: methods.{name}.lr is {written!r}; give a number above 0, or a list of numbers "
            "from which cross-validation inside the support selects."
        )
    return rates


def choice_of_rate(params: Params, name: str) -> LearningRates | None:
    """Return the settings by which a learning rate is selected; None if there are not several."""
    rates = learning_rates(params, name)
    return LearningRates(rates, **dataclasses.asdict(params.learning_rates)) if len(rates) > 1 else None


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


def support_views(params: Params, method: str) -> int:
    """Return the number of views that a method takes of each training image."""
    return 1 + params.views.augmented if METHODS[params.method(method)[0]].takes_views else 1
