"""A study's methods: their settings in params.yaml, checked, and the methods built from them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

from flows.study.params import Params
from medfocus.learning.method import Method
from medfocus.learning.selection import LearningRates
from medfocus.methods import METHODS

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


def build_method(params: Params, name: str, encoder: ClipEncoder | None) -> Method:
    """An unfitted method with its hyperparameters; without an encoder it serves only to check them.

    Of several learning rates it has the first; see ``learning_rates``.

    Raises:
        ValueError: The name or a hyperparameter is unknown, missing or out of range.
    """
    kind, settings = params.method(name)
    if kind not in METHODS:
        raise ValueError(
            f"params.yaml: methods.{name} is not a method; known are {', '.join(METHODS)}. For a further row "
            "of one of them write like: and its name."
        )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    if rates := learning_rates(params, name):
        settings["lr"] = rates[0]
    try:
        return METHODS[kind](cast("ClipEncoder", encoder), **settings)
    except TypeError as error:
        raise ValueError(f"params.yaml: methods.{name}: {error}.") from error


def learning_rates(params: Params, name: str) -> tuple[float, ...]:
    """The rates of which a method's is chosen inside its support; () for a method that has none.

    Raises ValueError for anything but numbers above 0.
    """
    settings = params.method(name)[1]
    if "lr" not in settings:
        return ()
    written = settings["lr"]
    rates = tuple(written) if isinstance(written, list) else (written,)
    if not rates or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise ValueError(
            f"params.yaml: methods.{name}.lr is {written!r}; give a number above 0, or a list of them, of "
            "which one is then chosen by cross-validation inside the support."
        )
    return rates


def choice_of_rate(params: Params, name: str) -> LearningRates | None:
    """How a method's learning rate is chosen; None where there is nothing to choose."""
    rates = learning_rates(params, name)
    return LearningRates(rates, **dataclasses.asdict(params.learning_rates)) if len(rates) > 1 else None


def support_views(params: Params, method: str) -> int:
    """How many views of each training image a method takes."""
    return 1 + params.views.augmented if METHODS[params.method(method)[0]].takes_views else 1
