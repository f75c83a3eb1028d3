"""A guess of the modality, from DICOM headers, or from names and the look of the images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medfocus.images import decode

OTHER = "other"
_SIDE = 128  # pixels, enough for a first look
_DARK = 0.06  # share of white; darker pixels are air or outside the body
_COLOUR = 0.05  # mean range of a pixel's channels; 0.00 in eight public grey data sets
# Medians over 16 images of eight public sets: dark share 0.02 to 0.09 in chest films, 0.32 in CT and 0.48
# in MRI slices; mean brightness 0.50 to 0.57 in chest films, 0.17 to 0.28 in all others.
_SLICE = 0.2
_FILM = 0.4


@dataclass(frozen=True)
class Look:
    """The look of some images: medians, each in [0, 1]."""

    colour: float
    dark: float
    brightness: float


@dataclass(frozen=True)
class Guess:
    """A modality of the params file, with the reason."""

    modality: str
    reason: str


@dataclass(frozen=True)
class _Kind:
    technique: frozenset[str]  # words for the imaging technique
    subject: frozenset[str]  # words for the body part and its findings

    def fits(self, words: frozenset[str], techniques: frozenset[str]) -> bool:
        """Return whether the words name the subject, with this technique or without any."""
        return bool(words & self.subject) and (bool(words & self.technique) or not words & techniques)

    def hits(self, words: frozenset[str]) -> list[str]:
        """Return the words that name the technique or the subject."""
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

# DICOM's Modality -> BodyPartExamined ("" if absent) -> our modality.
_LUNGS = ("CHEST", "THORAX", "LUNG")
_BY_HEADER = {
    **dict.fromkeys(("CR", "DX", "DR"), dict.fromkeys(_LUNGS, "chest_xray")),
    "CT": dict.fromkeys((*_LUNGS, ""), "chest_ct"),
    "MR": dict.fromkeys(("BRAIN", "HEAD"), "brain_mri"),
    "US": {"BREAST": "breast_ultrasound"},
}


def by_headers(headers: Iterable[tuple[str, str]]) -> Guess | None:
    """Return the modality by DICOM's Modality and BodyPartExamined, or None if they do not decide.

    The headers decide if all images have the same tags and name the body part.
    """
    distinct = set(headers)
    if len(distinct) != 1:
        return None
    [(dicom_modality, body_part)] = distinct
    for word, modality in _BY_HEADER.get(dicom_modality, {}).items():
        if word == body_part or (word and word in body_part):
            part = f", BodyPartExamined {body_part}" if body_part else ""
            return Guess(modality, f"by DICOM's Modality {dicom_modality}{part}")
    if dicom_modality and body_part:
        return Guess(OTHER, f"DICOM's Modality is {dicom_modality}, BodyPartExamined {body_part}")
    return None


def look_at(files: Sequence[Path]) -> Look:
    """Return the median look of one or more readable images."""
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
    """Return the modality that the names suggest, if the images look like it; otherwise "other"."""
    words = frozenset(
        word for text in texts for word in re.findall(r"[a-z]+\d*", _split_humps(text).casefold())
    )
    if look.colour > _COLOUR:
        return Guess(OTHER, "the images are in colour")
    named = {name: kind.hits(words) for name, kind in _KINDS.items() if kind.fits(words, _TECHNIQUES)}
    if not named:
        return Guess(OTHER, "no folder or class name suggests one")
    likely = {name: hits for name, hits in named.items() if _looks_like(name, look)}
    if not likely:
        names = " or ".join(named)
        return Guess(OTHER, f"the names suggest {names}, but the images do not look like it")
    best = max(map(len, likely.values()))
    first, *others = (name for name, hits in likely.items() if len(hits) == best)
    if others:
        return Guess(OTHER, f"the names suggest {first} or {' or '.join(others)}")
    return Guess(first, f"by the words {', '.join(likely[first])}, and the images look like it")


def _split_humps(text: str) -> str:
    joined = re.sub(r"(?i)x[-_ ]ray", "xray", text)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", joined).replace("_", " ")


def _looks_like(modality: str, look: Look) -> bool:
    if modality == "chest_xray":
        return look.dark < _SLICE
    if modality in ("chest_ct", "brain_mri"):
        return look.dark > _SLICE
    return look.brightness < _FILM
