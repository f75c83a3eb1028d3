"""Split a data set into train and test, and draw nested support sets from train.

A digest of seed and path determines the place of an image in a random order; nothing else does. A new or
broken image does not reshuffle the others, and does not change the supports of other classes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medfocus.datasets.records import Record


@dataclass(frozen=True)
class Splits:
    """The draws of a data set. All lists of paths are sorted."""

    classes: list[str]  # sorted
    train: list[str]  # includes an official val set, because validation happens inside train
    test: list[str]  # the official test set, unchanged, if there is one
    clean_test: list[str]  # test images without a twin or a patient in train; equals a drawn test set
    conflicting: list[str]  # have a twin with another label; not in train, clean_test or a drawn test set
    straddling_twins: list[str]  # official test images with a twin in train
    straddling_patients: list[str]  # patients in both official splits
    groups: dict[str, int]  # train image -> group of patients and duplicates; folds keep groups whole
    supports: dict[int, dict[str, list[str]]]  # seed -> "5%", "10%", ..., "1-shot", ... -> train images


def draw_splits(
    records: Sequence[Record],
    groups: Mapping[str, Hashable],
    twins: Mapping[str, Hashable],
    *,
    test_fraction: float,
    fractions: Sequence[float],
    shots: Sequence[int],
    seeds: Sequence[int],
) -> Splits:
    """Keep the official test set or draw one, then draw support sets for each seed.

    Without a record of split "test", a test set is drawn: ``test_fraction`` of each class, as closely as
    whole components over patients and ``groups`` allow. Each seed orders the images of each class once. A
    support takes the first images of this order, so that supports nest: max(1, round(fraction * N)) images of
    a class with N images, or a number of shots.

    Args:
        records: The data set.
        groups: path -> group of duplicates and neighbouring frames; a drawn split never divides a group.
        twins: path -> group of copies, each inside one of ``groups``. If the labels in a group differ, the
            correct label is unknown, and the whole group is left out.
        test_fraction: Share of each class in a drawn test set.
        fractions: Shares of the training images of each class, in (0, 1].
        shots: Training images per class.
        seeds: Each seed draws another support set.

    Raises:
        ValueError: A setting is out of range, a class cannot be in both train and test, or classes have fewer
            training images than the shots require; one message lists all such classes.
    """
    _check_settings(test_fraction, fractions, shots, seeds)
    label = {record.path: record.label for record in records}
    conflicting = _conflicting(records, twins)
    official = {record.path for record in records if record.split == "test"}
    if official:
        # Images of a component share a twin or patient, directly or through other images.
        component = components(records, twins)
        train = label.keys() - official - conflicting
        test = official
        seen = {component[path] for path in label.keys() - official}
        clean = {path for path in official - conflicting if component[path] not in seen}
    else:
        usable = [record for record in records if record.path not in conflicting]
        test = clean = _draw_test(usable, components(usable, groups), test_fraction)
        train = {record.path for record in usable} - test
    by_class: dict[str, list[str]] = defaultdict(list)
    for path in train:
        by_class[label[path]].append(path)
    classes = sorted(set(label.values()))
    _check_train(classes, by_class, shots)
    together = components([record for record in records if record.path in train], groups)
    return Splits(
        classes=classes,
        train=sorted(train),
        test=sorted(test),
        clean_test=sorted(clean),
        conflicting=sorted(conflicting),
        straddling_twins=_straddling_twins(official, label.keys() - official, twins),
        straddling_patients=_straddling_patients(records),
        groups=together,
        supports={seed: _draw_supports(by_class, fractions, shots, seed) for seed in seeds},
    )


def write_splits(splits: Splits, path: Path) -> None:
    """Write splits as JSON; equal splits give equal bytes."""
    path.write_text(json.dumps(asdict(splits), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_splits(path: Path) -> Splits:
    """Read splits that ``write_splits`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Splits(
        **{**content, "supports": {int(seed): draws for seed, draws in content["supports"].items()}}
    )


def _check_settings(
    test_fraction: float, fractions: Sequence[float], shots: Sequence[int], seeds: Sequence[int]
) -> None:
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"splits.test_fraction is {test_fraction}; use a share between 0 and 1, such as 0.2."
        )
    if bad := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ValueError(
            f"fractions of train: {bad} are outside of (0, 1]; give study.percents above 0 and up to 100."
        )
    if bad := [count for count in shots if count < 1]:
        raise ValueError(f"study.shots: {bad} are below 1 image per class; give at least 1.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"study.seeds: {list(seeds)} is empty or has repetitions; give one seed per support set."
        )


def _check_train(classes: Sequence[str], by_class: Mapping[str, Sequence[str]], shots: Sequence[int]) -> None:
    if empty := [name for name in classes if name not in by_class]:
        raise ValueError(f"classes {empty} have no training image; add some, or remove the classes.")
    most = max(shots, default=0)
    short = [f"{name!r} has {len(by_class[name])}" for name in classes if len(by_class[name]) < most]
    if short:
        raise ValueError(
            f"too few training images: class {', class '.join(short)}, but study.shots needs {most}. "
            "Lower it in params.yaml, or add images."
        )


def _conflicting(records: Iterable[Record], twins: Mapping[str, Hashable]) -> set[str]:
    members: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        members[twins[record.path]].append(record)
    differing = (group for group in members.values() if len({record.label for record in group}) > 1)
    return {record.path for group in differing for record in group}


def components(records: Iterable[Record], groups: Mapping[str, Hashable]) -> dict[str, int]:
    """Return path -> connected component over groups and patients, numbered by first path."""
    ordered = sorted(records, key=lambda record: record.path)
    node: dict[tuple[str, Hashable], int] = {}
    edges: list[tuple[int, int]] = []
    for i, record in enumerate(ordered):
        ties: list[tuple[str, Hashable]] = [("group", groups[record.path])]
        ties += [("patient", record.patient)] if record.patient else []
        edges += [(i, len(ordered) + node.setdefault(tie, len(node))) for tie in ties]
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    total = len(ordered) + len(node)
    _, ids = connected_components(
        coo_array((np.ones(len(rows)), (rows, columns)), shape=(total, total)), False
    )
    number: dict[int, int] = {}
    return {record.path: number.setdefault(int(ids[i]), len(number)) for i, record in enumerate(ordered)}


def _straddling_twins(
    test: Collection[str], train: Collection[str], twins: Mapping[str, Hashable]
) -> list[str]:
    seen = {twins[path] for path in train}
    return sorted(path for path in test if twins[path] in seen)


def _straddling_patients(records: Iterable[Record]) -> list[str]:
    sides: dict[str, set[bool]] = defaultdict(set)
    for record in records:
        sides[record.patient].add(record.split == "test")
    return sorted(patient for patient, side in sides.items() if patient and len(side) > 1)


def _draw_test(records: Sequence[Record], component: Mapping[str, int], fraction: float) -> set[str]:
    """Draw whole components in a random order until each class has its share.

    First take components that fit into the shares of all their classes, then components that bring the counts
    closer to the shares, then, for each class without test images, its smallest component.
    """
    members: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        members[component[record.path]].append(record)
    parts = sorted(members.values(), key=lambda part: _rank("test", min(record.path for record in part)))
    counts = [Counter(record.label for record in part) for part in parts]
    whole = Counter(record.label for record in records)
    missing = Counter({name: max(1, round(fraction * count)) for name, count in whole.items()})
    chosen: set[int] = set()

    def take(i: int) -> None:
        chosen.add(i)
        missing.subtract(counts[i])

    for i, count in enumerate(counts):
        if all(missing[name] >= n for name, n in count.items()):
            take(i)
    for i, count in enumerate(counts):
        if (
            i not in chosen
            and sum(abs(missing[name] - n) - abs(missing[name]) for name, n in count.items()) < 0
        ):
            take(i)
    having = {name: {i for i, count in enumerate(counts) if count[name]} for name in sorted(whole)}
    for places in having.values():
        if not chosen & places:
            take(min(places, key=lambda i: (counts[i].total(), i)))
    for name, places in having.items():
        if places <= chosen:
            raise ValueError(
                f"class {name!r} cannot be in both train and test: its {whole[name]} images form "
                f"{len(places)} group(s) of patients and duplicates. Add images, or remove the class."
            )
    return {record.path for i in chosen for record in parts[i]}


def _draw_supports(
    by_class: Mapping[str, Iterable[str]], fractions: Sequence[float], shots: Sequence[int], seed: int
) -> dict[str, list[str]]:
    ordered = [sorted(paths, key=lambda path: _rank(seed, path)) for paths in by_class.values()]
    supports = {
        f"{100 * fraction:g}%": [
            p for paths in ordered for p in paths[: max(1, round(fraction * len(paths)))]
        ]
        for fraction in sorted(fractions)
    }
    supports |= {f"{k}-shot": [path for paths in ordered for path in paths[:k]] for k in sorted(shots)}
    return {name: sorted(paths) for name, paths in supports.items()}


def _rank(draw: int | str, path: str) -> bytes:
    """Return a random key that depends only on the draw and the path."""
    return hashlib.sha256(f"{draw}/{path}".encode()).digest()
