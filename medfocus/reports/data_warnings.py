"""Warnings about a data set, as sentences for the reader of its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from medfocus.datasets.duplicates import NEAR_KIND, Pair
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits

_IMBALANCE = 3  # ratio of the largest class to the smallest that makes accuracy misleading
_FEW_TEST = 10  # test images of a class; with fewer, its recall has steps of more than 10 points
_RUNG_SPREAD = 0.3  # difference between two classes' shares of one rung of the fallback ladder
_RUNGS = ("chosen", "relaxed", "box", "identity")


def data_warnings(records: Iterable[Record], splits: Splits, pairs: Sequence[Pair]) -> list[str]:
    """Return warnings about duplicates and patients across train and test, labels, and class sizes."""
    by_path = {record.path: record for record in records}
    train, test = set(splits.train), set(splits.test)
    warnings = []
    if splits.straddling_twins:
        warnings.append(
            f"{len(splits.straddling_twins)} of {len(test)} test images are also in train. The clean test "
            f"set excludes {len(test) - len(splits.clean_test)} images and is more reliable."
        )
    across = [pair for pair in pairs if (pair.path_a in test) != (pair.path_b in test)]
    near = sum(pair.kind == NEAR_KIND and {pair.path_a, pair.path_b} <= train | test for pair in across)
    if near:
        warnings.append(
            f"{near} {'pair has' if near == 1 else 'pairs have'} nearly the same image in train and in test, "
            "such as neighbouring frames of one patient. The clean test set includes them."
        )
    if splits.straddling_patients:
        number = len(splits.straddling_patients)
        patients = "1 patient has" if number == 1 else f"{number} patients have"
        warnings.append(f"{patients} images in train and in test.")
    unknown = sum(not record.patient for record in by_path.values())
    if unknown:
        images = (
            "No image has a" if unknown == len(by_path) else f"{unknown} of {len(by_path)} images have no"
        )
        warnings.append(f"{images} known patient, so a patient may be in train and in test.")
    if splits.conflicting:
        number = len(splits.conflicting)
        images = "1 image has" if number == 1 else f"{number} images have"
        warnings.append(
            f"{images} a duplicate with another label. Training excludes such images; an official test set "
            "includes them."
        )
    for name, paths in (("train", splits.train), ("test", splits.test)):
        counts = Counter(by_path[path].label for path in paths)
        most, least = (pick(splits.classes, key=lambda label: counts[label]) for pick in (max, min))
        if counts[most] >= _IMBALANCE * max(1, counts[least]):
            warnings.append(
                f"Unequal classes in {name}: {counts[most]} images of '{most}', {counts[least]} of "
                f"'{least}'. Read balanced accuracy as well."
            )
        tiny = [f"'{label}' ({counts[label]})" for label in splits.classes if counts[label] < _FEW_TEST]
        if tiny and name == "test":
            warnings.append(f"Tiny classes in test, with unreliable recall: {', '.join(tiny)}.")
    return warnings


def mask_warnings(lines: Iterable[Mapping[str, object]]) -> list[str]:
    """Return warnings about rungs of the fallback ladder that depend on the class, from lines of masks.csv.

    Such a rung reveals the class independently of the image's content.
    """
    lines, warnings = list(lines), []
    for rung in _RUNGS:
        shares = {
            str(line["label"]): float(str(line[rung])) for line in lines if line.get(rung) not in ("", None)
        }
        if not shares:
            continue
        most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        if shares[most] - shares[least] > _RUNG_SPREAD:
            warnings.append(
                f"'{rung}' made {100 * shares[most]:.0f} % of the masks of '{most}' and "
                f"{100 * shares[least]:.0f} % of '{least}', so the rung can reveal the class."
            )
    return warnings
