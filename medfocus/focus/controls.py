"""Define controls: focus modes that show another region, to test whether the right region matters."""

from __future__ import annotations

from typing import Literal, NamedTuple

MaskSource = Literal["own", "another image's", "center box"]


class Control(NamedTuple):
    """The focus mode and the mask of a control."""

    mode: str  # a key of medfocus.focus.modes.FOCUS or medfocus.clip.regions.REGIONS
    mask: MaskSource


CONTROLS = {
    "inverse": Control("inverse", "own"),
    "shuffled": Control("multiply", "another image's"),
    "center-box": Control("multiply", "center box"),
    "shuffled-crop": Control("dual-crop", "another image's"),
    "center-crop": Control("dual-crop", "center box"),
}


def focus_of(focus: str) -> str:
    """Return the ``focus`` of ``medfocus.focus.view.view`` for the focus of a study or for a control."""
    return CONTROLS[focus].mode if focus in CONTROLS else focus


def mask_source_of(focus: str) -> MaskSource:
    """Return the source of the mask for the focus of a study or for a control."""
    return CONTROLS[focus].mask if focus in CONTROLS else "own"
