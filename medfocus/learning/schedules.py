"""A method's hyperparameters under both schedules: as published, or small for small models and machines.

In params.yaml, a method's section holds the published hyperparameters. The values in its ``small`` replace
them if the schedule is "small".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEDULES = ("published", "small")


def scheduled(section: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """Return the hyperparameters in a method's section for a schedule, one of SCHEDULES."""
    published = {name: value for name, value in section.items() if name != "small"}
    return {**published, **section.get("small", {})} if schedule == "small" else published


def extended(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's section ``own``, completed from the section ``base`` that it extends.

    An own value holds for both schedules: it also takes precedence over a value in the ``small`` of ``base``.
    """
    if not isinstance(own.get("small", {}), Mapping):
        return {**base, **own}  # for the check of the whole file to report
    inherited = {name: value for name, value in base.get("small", {}).items() if name not in own}
    small = {**inherited, **own.get("small", {})}
    section = {name: value for name, value in {**base, **own}.items() if name != "small"}
    return {**section, "small": small} if small else section
