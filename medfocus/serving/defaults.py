"""The default hyperparameters, from the embedded study's params.yaml. The wheel contains this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from medfocus.learning.schedules import scheduled
from medfocus.masks.settings import SETTINGS, SegmenterSettings

_PACKAGE = Path(__file__).parents[1]


def packaged_params() -> Path:
    """Return the path of params.yaml: in the package if this is an installed wheel, else in the checkout."""
    packaged = _PACKAGE / "params.yaml"
    return packaged if packaged.is_file() else _PACKAGE.parent / "params.yaml"


@cache
def default_params() -> dict[str, Any]:
    """Return the content of params.yaml. Callers share it and must not change it."""
    return yaml.safe_load(packaged_params().read_text(encoding="utf-8"))


def method_settings(name: str, schedule: str) -> dict[str, Any]:
    """Return a method's hyperparameters under a schedule, "published" or "small".

    Raises ValueError if params.yaml has no section for the method.
    """
    if name not in default_params()["methods"]:
        raise ValueError(f"{packaged_params()}: methods has no section {name!r}. Add its hyperparameters.")
    return scheduled(default_params()["methods"][name], schedule)


def changed_settings(name: str, schedule: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's hyperparameters with ``changes``. Raises ValueError for one that it does not have."""
    known = method_settings(name, schedule)
    if unknown := sorted(changes.keys() - known.keys()):
        raise ValueError(
            f"MedFocusCLIP: settings has {unknown[0]!r}, which {name} does not have. It has "
            f"{', '.join(known) or 'no settings'}."
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in {**known, **changes}.items()}


def segmenter_settings(kind: str, modality: str, changes: Mapping[str, Any]) -> SegmenterSettings:
    """Return a segmenter's settings for a modality, from params.yaml with ``changes``."""
    masks = default_params()["masks"]
    masks = masks | {"keep": masks["keep"].get(modality, 1)}
    defaults = {field.name: masks[field.name] for field in fields(SETTINGS[kind]) if field.name in masks}
    return SETTINGS[kind](**{**defaults, **changes})
