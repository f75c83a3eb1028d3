"""The choice of a registered model or a model folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medfocus.tracking import registry
from medfocus.tracking.registry import Registered


def choose(home: Path, model: str | None) -> Registered:
    """Return a registered version of a model.

    ``model`` is NAME, NAME@VERSION or, if only one model is registered, None. Without a version, return the
    champion or, if there is none, the newest version.

    Raises ValueError, with a list of the models or versions, if there is no such version.
    """
    versions = registry.registered(home)
    names = list(dict.fromkeys(each.name for each in versions))
    if not versions:
        raise ValueError(
            f"{home}: no model is registered. Run a study (medfocus run), import a model (medfocus models "
            "import), or give a model folder."
        )
    if model is None and len(names) > 1:
        raise ValueError(f"several models are registered. Choose one with --model: {', '.join(names)}.")
    name, _, number = (model or names[0]).partition("@")
    of_model = [each for each in versions if each.name == name]
    if not of_model:
        raise ValueError(f"no model {name!r} is registered. Choose from {', '.join(names)}.")
    if chosen := _chosen(of_model, number):
        return chosen
    known = ", ".join(f"{name}@{each.version}" for each in of_model)
    raise ValueError(f"{name} has no version {number!r}. Choose from {known}.")


def _chosen(versions: Sequence[Registered], number: str) -> Registered | None:
    """Return the version with this number; without a number, the champion or else the newest version."""
    if number and number != registry.CHAMPION:
        return next((each for each in versions if each.version == number), None)
    champion = next((each for each in versions if each.alias), None)
    return champion or (None if number else versions[0])


@contextmanager
def opened(home: Path, model: str | None) -> Iterator[tuple[str, Path]]:
    """Yield a model's name and folder for the ``with`` block. ``model`` is a folder or as in ``choose``."""
    if model is not None and Path(model).is_dir():
        yield model, Path(model)
        return
    chosen = choose(home, model)
    with tempfile.TemporaryDirectory() as folder:
        name = f"{chosen.name} version {chosen.version}" + (f" ({chosen.alias})" if chosen.alias else "")
        yield name, chosen.model_folder(Path(folder))
