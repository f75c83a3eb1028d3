"""What kind of images a data set may hold, by its words and by what the images look like: a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medfocus.images import decode

OTHER = "other"
_SIDE = 128  # pixels; what a glance needs
_DARK = 0.06  # of white; below it there is nothing but air, or the outside of the image
_COLOUR = 0.05  # mean difference of the channels; in eight public sets of grey images 0.00
# Medians over 16 images of eight public sets: dark share 0.02 to 0.09 in chest films, 0.32 in CT and 0.48
# in MRI slices; mean brightness 0.50 to 0.57 in chest films, 0.17 to 0.28 in all others.
_SLICE = 0.2
_FILM = 0.4


@dataclass(frozen=True)
class Look:
    """What some images look like on the whole; medians, each in [0, 1]."""

    colour: float
    dark: float
    brightness: float


@dataclass(frozen=True)
class Guess:
    """A modality of the params file, and why."""

    modality: str
    reason: str


@dataclass(frozen=True)
class _Kind:
    technique: frozenset[str]  # how it is taken
    subject: frozenset[str]  # what is taken, and findings that have their place there

    def fits(self, words: frozenset[str], techniques: frozenset[str]) -> bool:
        """It is spoken of, and no other technique alone is."""
        return bool(words & self.subject) and (bool(words & self.technique) or not words & techniques)

    def hits(self, words: frozenset[str]) -> list[str]:
        return sorted(words & (self.technique | self.subject))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KINDS = {
    "chest_xray": _Kind(
        _words("cxr xray radiograph radiographs film films"),
        _words(
            "chest cxr thorax lung lungs pneumonia tuberculosis tb covid covid19 pneumothorax effusion corona"
        ),
    ),
    "chest_ct": _Kind(
        _words("ct tomography"),
        _words("chest thorax lung lungs adenocarcinoma squamous covid covid19 nodule nodules"),
    ),
    "brain_mri": _Kind(
        _words("mri mr magnetic t1 t2 flair"),
        _words("brain glioma meningioma pituitary glioblastoma alzheimer dementia stroke"),
    ),
    "breast_ultrasound": _Kind(_words("ultrasound us sonogram sonography busi"), _words("breast busi mamma")),
}
_TECHNIQUES = frozenset().union(*(kind.technique for kind in _KINDS.values()))


# DICOM's words for how something is taken -> for what of the body, "" if not told -> the modality.
_LUNGS = ("CHEST", "THORAX", "LUNG")
_TOLD = {
    **dict.fromkeys(("CR", "DX", "DR"), dict.fromkeys(_LUNGS, "chest_xray")),
    "CT": dict.fromkeys((*_LUNGS, ""), "chest_ct"),
    "MR": dict.fromkeys(("BRAIN", "HEAD"), "brain_mri"),
    "US": {"BREAST": "breast_ultrasound"},
}


def told(headers: Iterable[tuple[str, str]]) -> Guess | None:
    """The modality by DICOM's tags Modality and BodyPartExamined; None where these do not decide.

    They do where all images have the same, and the part is one that is known here.
    """
    several = set(headers)
    if len(several) != 1:
        return None
    [(modality, body_part)] = several
    for word, meant in _TOLD.get(modality, {}).items():
        if word == body_part or (word and word in body_part):
            part = f", BodyPartExamined {body_part}" if body_part else ""
            return Guess(meant, f"by DICOM's Modality {modality}{part}")
    if modality and body_part:
        return Guess(OTHER, f"DICOM's Modality is {modality}, BodyPartExamined {body_part}")
    return None


def look_at(files: Sequence[Path]) -> Look:
    """What readable images look like; at least one is needed."""
    rows = []
    for file in files:
        image = Image.fromarray(decode.read(file))
        image.thumbnail((_SIDE, _SIDE))
        values = np.asarray(image, dtype=np.float32) / 255  # (h, w, 3)
        colour = float((values.max(axis=2) - values.min(axis=2)).mean())
        grey = values.mean(axis=2)
        rows.append((colour, float((grey < _DARK).mean()), float(grey.mean())))
    return Look(*(float(value) for value in np.median(np.array(rows), axis=0)))


def guess(texts: Iterable[str], look: Look) -> Guess:
    """The modality that the words of a data set name, if its images do not look otherwise; else "other"."""
    words = frozenset(
        word for text in texts for word in re.findall(r"[a-z]+\d*", _split_humps(text).casefold())
    )
    if look.colour > _COLOUR:
        return Guess(OTHER, "the images are in colour")
    named = {name: kind.hits(words) for name, kind in _KINDS.items() if kind.fits(words, _TECHNIQUES)}
    if not named:
        return Guess(OTHER, "no folder or class has a name that tells")
    able = {name: hits for name, hits in named.items() if _looks_like(name, look)}
    if not able:
        told = " or ".join(named)
        return Guess(OTHER, f"the names say {told}, but the images do not look like it")
    best = max(map(len, able.values()))
    first, *others = (name for name, hits in able.items() if len(hits) == best)
    if others:
        return Guess(OTHER, f"the names may say {first} or {' or '.join(others)}")
    return Guess(first, f"by the words {', '.join(able[first])}, and the images look like it")


def _split_humps(text: str) -> str:
    joined = re.sub(r"(?i)x[-_ ]ray", "xray", text)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", joined).replace("_", " ")


def _looks_like(modality: str, look: Look) -> bool:
    if modality == "chest_xray":
        return look.dark < _SLICE
    if modality in ("chest_ct", "brain_mri"):
        return look.dark > _SLICE
    return look.brightness < _FILM
