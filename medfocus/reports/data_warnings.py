"""What a reader has to know of a data set before believing a number on it, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from medfocus.datasets.duplicates import NEAR_KIND, Pair
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits

_IMBALANCE = 3  # the largest class over the smallest, from which accuracy alone misleads
_FEW_TEST = 10  # test images of a class; fewer give its recall in steps of more than 10 points
_RUNG_SPREAD = 0.3  # between the classes' shares of one rung of the masks' ladder
_RUNGS = ("chosen", "relaxed", "box", "identity")


def data_warnings(records: Iterable[Record], splits: Splits, pairs: Sequence[Pair]) -> list[str]:
    """Duplicates and patients across train and test, unknown patients, conflicting labels, unequal and tiny
    classes; empty where none of it holds.
    """
    by_path = {record.path: record for record in records}
    train, test = set(splits.train), set(splits.test)
    said = []
    if splits.straddling_twins:
        said.append(
            f"{len(splits.straddling_twins)} of {len(test)} test images occur in train as well, and "
            f"{len(test) - len(splits.clean_test)} are left out of the clean test set for what they share "
            "with train: believe its numbers rather than the official ones."
        )
    across = [pair for pair in pairs if (pair.path_a in test) != (pair.path_b in test)]
    near = sum(pair.kind == NEAR_KIND and {pair.path_a, pair.path_b} <= train | test for pair in across)
    if near:
        said.append(
            f"{near} {'pair is' if near == 1 else 'pairs are'} nearly the same image in train and in test, "
            "such as neighbouring frames of one patient; the clean test set keeps these."
        )
    if splits.straddling_patients:
        number = len(splits.straddling_patients)
        whose = "1 patient has" if number == 1 else f"{number} patients have"
        said.append(f"{whose} images in train and in test.")
    unknown = sum(not record.patient for record in by_path.values())
    if unknown:
        of = "No image has a" if unknown == len(by_path) else f"{unknown} of {len(by_path)} images have no"
        said.append(f"{of} known patient: one patient may be in train and in test.")
    if splits.conflicting:
        number = len(splits.conflicting)
        some = "1 image has" if number == 1 else f"{number} images have"
        said.append(
            f"{some} a twin with another label; nothing is trained on such images, but in an official test "
            "set they still count."
        )
    for name, paths in (("train", splits.train), ("test", splits.test)):
        counts = Counter(by_path[path].label for path in paths)
        most, least = (pick(splits.classes, key=lambda label: counts[label]) for pick in (max, min))
        if counts[most] >= _IMBALANCE * max(1, counts[least]):
            said.append(
                f"Unequal classes in {name}: {counts[most]} images of '{most}', {counts[least]} of "
                f"'{least}'. Read balanced accuracy beside accuracy."
            )
        tiny = [f"'{label}' ({counts[label]})" for label in splits.classes if counts[label] < _FEW_TEST]
        if tiny and name == "test":
            said.append(f"Tiny classes in test, whose recall means little: {', '.join(tiny)}.")
    return said


def mask_warnings(lines: Iterable[Mapping[str, object]]) -> list[str]:
    """Rungs of the masks' fallback ladder that go with a class, from the lines of masks.csv.

    Such a rung can tell the class without what is in the image.
    """
    lines, said = list(lines), []
    for rung in _RUNGS:
        shares = {
            str(line["label"]): float(str(line[rung])) for line in lines if line.get(rung) not in ("", None)
        }
        if not shares:
            continue
        most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
        if shares[most] - shares[least] > _RUNG_SPREAD:
            said.append(
                f"'{rung}' gave {100 * shares[most]:.0f} % of the masks of '{most}' and "
                f"{100 * shares[least]:.0f} % of '{least}': how a mask was found can tell the class."
            )
    return said
