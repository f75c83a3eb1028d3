"""Draws are stratified, nested and grouped, and do not depend on other images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfocus.datasets.duplicates import find_duplicates, groups, twins
from medfocus.datasets.ingest import ingest
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits, draw_splits, read_splits, write_splits

FRACTIONS = (0.05, 0.1, 0.2, 0.5, 1.0)
SHOTS = (1, 2, 4)


def record(path: str, label: str, split: str = "", patient: str = "") -> Record:
    return Record(path, path, 1, 1, "L", label, split, patient)


def images(counts: dict[str, int], split: str = "") -> list[Record]:
    return [record(f"{split}/{name}/{i}.png", name, split) for name, n in counts.items() for i in range(n)]


def draw(
    records: Sequence[Record],
    same: Sequence[Sequence[str]] = (),
    near: Sequence[Sequence[str]] = (),
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1),
    test_fraction: float = 0.25,
) -> Splits:
    """Draw splits; ``same`` and ``near`` list groups of paths, and other images form their own groups."""
    alone = {record.path: record.path for record in records}
    twin_groups = alone | {path: group[0] for group in same for path in group}
    wide = dict(twin_groups)
    for group in near:
        merged = {twin_groups[path] for path in group}
        wide |= {path: group[0] for path, twin in twin_groups.items() if twin in merged}
    return draw_splits(
        records, wide, twin_groups, test_fraction=test_fraction, fractions=FRACTIONS, shots=shots, seeds=seeds
    )


def labels_of(records: Sequence[Record], paths: Sequence[str]) -> Counter[str]:
    label = {record.path: record.label for record in records}
    return Counter(label[path] for path in paths)


@st.composite
def data_sets(drawing: st.DrawFn) -> tuple[list[Record], list[list[str]]]:
    """Three classes of 12 to 40 images, patients of a few images, and groups of near-duplicates."""
    rng = np.random.default_rng(drawing(st.integers(0, 2**32 - 1)))
    records = [
        replace(item, patient=str(rng.integers(60)) if rng.random() < 0.5 else "")
        for item in images({name: int(rng.integers(12, 41)) for name in ("a", "b", "c")})
    ]
    shuffled = [records[i].path for i in rng.permutation(len(records))]
    near = [shuffled[i : i + 3] for i in range(0, 3 * int(rng.integers(0, 6)), 3)]
    return records, near


@settings(max_examples=60, deadline=None)
@given(data_set=data_sets())
def test_a_drawn_split_never_divides_patients_or_duplicates(
    data_set: tuple[list[Record], list[list[str]]],
) -> None:
    records, near = data_set
    splits = draw(records, near=near)
    train, test = set(splits.train), set(splits.test)
    assert not train & test
    assert train | test == {item.path for item in records}
    assert splits.clean_test == splits.test
    for group in near:
        assert set(group) <= train or set(group) <= test
        if set(group) <= train:
            assert len({splits.groups[path] for path in group}) == 1
    for patient in {item.patient for item in records} - {""}:
        own = {item.path for item in records if item.patient == patient}
        assert own <= train or own <= test


@settings(max_examples=60, deadline=None)
@given(data_set=data_sets())
def test_a_drawn_test_split_is_nearly_stratified(data_set: tuple[list[Record], list[list[str]]]) -> None:
    records, near = data_set
    splits = draw(records, near=near)
    whole, test = Counter(item.label for item in records), labels_of(records, splits.test)
    for name, count in whole.items():
        assert abs(test[name] - 0.25 * count) <= 3, (name, test[name], count)


@settings(max_examples=30, deadline=None)
@given(data_set=data_sets())
def test_supports_nest_and_are_stratified(data_set: tuple[list[Record], list[list[str]]]) -> None:
    records, near = data_set
    splits = draw(records, near=near)
    whole = labels_of(records, splits.train)
    for supports in splits.supports.values():
        assert list(supports) == ["5%", "10%", "20%", "50%", "100%", "1-shot", "2-shot", "4-shot"]
        for fraction, name in zip(FRACTIONS, supports, strict=False):
            expected = {label: max(1, round(fraction * n)) for label, n in whole.items()}
            assert labels_of(records, supports[name]) == expected
        for shots in SHOTS:
            assert labels_of(records, supports[f"{shots}-shot"]) == dict.fromkeys(whole, shots)
        for names in (["5%", "10%", "20%", "50%", "100%"], ["1-shot", "2-shot", "4-shot"]):
            for small, large in pairwise(names):
                assert set(supports[small]) <= set(supports[large])
        assert supports["100%"] == splits.train


def test_each_seed_draws_another_support_set() -> None:
    supports = draw(images({"a": 200, "b": 200}), seeds=range(5)).supports
    assert list(supports) == [0, 1, 2, 3, 4]
    assert len({tuple(draws["10%"]) for draws in supports.values()}) == 5


def test_every_training_image_is_equally_likely_in_a_support() -> None:
    records = images({"a": 20, "b": 20}, "train") + images({"a": 2, "b": 2}, "test")
    supports = draw(records, seeds=range(400)).supports
    drawn = Counter(path for draws in supports.values() for path in draws["20%"])
    assert len(drawn) == 40
    # 400 draws with p = 0.2: mean 80, standard deviation 8.
    assert all(45 < count < 115 for count in drawn.values())


def test_a_new_image_of_one_class_does_not_change_the_draws_of_others() -> None:
    records = images({"a": 60, "b": 60})
    before, after = draw(records), draw([*records, record("/a/new.png", "a")])
    for part in ("train", "test"):
        kept = [[path for path in getattr(s, part) if path.startswith("/b/")] for s in (before, after)]
        assert kept[0] == kept[1]
    for seed, draws in before.supports.items():
        for name, paths in draws.items():
            other = [path for path in after.supports[seed][name] if path.startswith("/b/")]
            assert [path for path in paths if path.startswith("/b/")] == other
            gone = {path for path in paths if path.startswith("/a/")} - set(after.supports[seed][name])
            assert len(gone) <= 1, "in its own class at most one image is replaced"


def test_the_order_of_records_does_not_matter() -> None:
    records = images({"a": 30, "b": 30})
    assert draw(records) == draw(records[::-1])


def official() -> list[Record]:
    return [
        *images({"a": 6, "b": 6}, "train"),
        *images({"a": 2, "b": 2}, "val"),
        *images({"a": 4, "b": 4}, "test"),
    ]


def test_an_official_test_split_is_kept_and_val_joins_train() -> None:
    splits = draw(official())
    assert splits.test == sorted(item.path for item in official() if item.split == "test")
    assert splits.clean_test == splits.test
    assert len(splits.train) == 16
    assert not splits.straddling_twins
    assert not splits.straddling_patients


def test_the_clean_test_set_has_no_twin_or_patient_of_train() -> None:
    patients = {"train/a/0.png": "p", "test/a/0.png": "p", "test/b/3.png": "q"}
    records = [replace(item, patient=patients.get(item.path, "")) for item in official()]
    same = [
        ["test/a/1.png", "val/a/1.png"],
        ["test/b/1.png", "test/b/2.png", "train/b/5.png"],  # one of them through the other
        ["test/b/0.png", "test/b/3.png"],  # twins inside test stay
    ]
    near = [["test/a/2.png", "train/a/2.png"]]  # a neighbouring frame is not a twin
    splits = draw(records, same, near)
    assert splits.clean_test == ["test/a/2.png", "test/a/3.png", "test/b/0.png", "test/b/3.png"]
    assert len(splits.test) == 8
    assert splits.straddling_twins == ["test/a/1.png", "test/b/1.png", "test/b/2.png"]
    assert splits.straddling_patients == ["p"]


def test_twins_with_two_labels_are_left_out_except_in_the_official_test_set() -> None:
    same = [
        ["train/a/0.png", "train/b/0.png"],
        ["test/a/0.png", "test/b/0.png"],
        ["test/a/1.png", "val/b/1.png"],
    ]
    splits = draw(official(), same)
    assert splits.conflicting == sorted(path for group in same for path in group)
    assert len(splits.test) == 8
    assert not set(splits.conflicting) & (set(splits.train) | set(splits.clean_test))


def test_twins_with_two_labels_are_left_out_of_a_drawn_split() -> None:
    records = images({"a": 20, "b": 20})
    splits = draw(records, same=[["/a/0.png", "/b/0.png"]], near=[["/a/1.png", "/b/1.png"]])
    assert splits.conflicting == ["/a/0.png", "/b/0.png"]
    assert len(splits.train) + len(splits.test) == 38, "neighbouring frames of two labels stay"


def test_written_splits_are_read_back_and_equal_splits_have_equal_bytes(tmp_path: Path) -> None:
    records = [*images({"a": 12, "größe": 12}), record("肺.png", "a", patient="p")]
    for name in ("one.json", "two.json"):
        write_splits(draw(records), tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert read_splits(tmp_path / "one.json") == draw(records)


def test_classes_too_small_for_the_shots_are_named_together() -> None:
    records = [*images({"a": 3, "b": 20, "c": 5}, "train"), *images({"a": 1, "b": 1, "c": 1}, "test")]
    fault = (
        r"too few training images: class 'a' has 3, class 'c' has 5, but study\.shots needs 16\. "
        r"Lower it in params\.yaml, or add images\."
    )
    with pytest.raises(ValueError, match=fault):
        draw(records, shots=(1, 16))


def test_a_class_of_one_patient_cannot_be_in_both_train_and_test() -> None:
    records = [*images({"b": 20}), *(replace(item, patient="p") for item in images({"a": 9}))]
    with pytest.raises(
        ValueError, match=r"class 'a' cannot be in both train and test: its 9 images form 1 group"
    ):
        draw(records)


def test_a_few_patients_with_many_images_still_give_a_test_set() -> None:
    records = [
        replace(item, patient=f"{item.label}{i // 10}")
        for name in "ab"
        for i, item in enumerate(images({name: 20}))
    ]
    assert labels_of(records, draw(records, test_fraction=0.2).test) == {"a": 10, "b": 10}


@pytest.mark.parametrize("label", ["a", "b"])
def test_a_class_without_training_images_is_named(label: str) -> None:
    records = [*images({"a": 9, "b": 9}, "train"), *images({"a": 3, "b": 3}, "test")]
    records = [item for item in records if (item.label, item.split) != (label, "train")]
    with pytest.raises(ValueError, match=rf"classes \['{label}'\] have no training image"):
        draw(records)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"test_fraction": 1.0}, r"splits\.test_fraction is 1\.0; use a share between 0 and 1"),
        ({"fractions": [0.1, 5]}, r"\[5\] are outside of \(0, 1\]"),
        ({"shots": [0]}, r"study\.shots: \[0\] are below 1 image"),
        ({"seeds": [1, 1]}, r"study\.seeds: \[1, 1\] is empty or has repetitions"),
        ({"seeds": []}, r"study\.seeds: \[\] is empty or has repetitions"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], fault: str) -> None:
    records = images({"a": 9, "b": 9})
    alone = {item.path: item.path for item in records}
    usual = {"test_fraction": 0.3, "fractions": [0.1], "shots": [1], "seeds": [0]}
    with pytest.raises(ValueError, match=fault):
        draw_splits(records, alone, alone, **{**usual, **settings})


def real_splits(root: Path) -> tuple[list[Record], Splits, dict[str, int]]:
    records = ingest(root).records
    pairs = find_duplicates(records, root)
    wide, twin_groups = groups(records, pairs), groups(records, twins(pairs))
    splits = draw_splits(
        records, wide, twin_groups, test_fraction=0.3, fractions=FRACTIONS, shots=(16,), seeds=range(5)
    )
    return records, splits, wide


def test_covid19_keeps_its_test_set_and_its_clean_one_has_nine_fewer_images(shared_data: Path) -> None:
    records, splits, _ = real_splits(shared_data / "covid19")
    assert labels_of(records, splits.test) == {"Covid": 26, "Normal": 20, "Viral Pneumonia": 20}
    assert labels_of(records, splits.clean_test) == {"Covid": 17, "Normal": 20, "Viral Pneumonia": 20}
    sizes = [len(splits.supports[0][name]) for name in ("5%", "10%", "20%", "50%", "100%")]
    assert sizes == [14, 25, 50, 126, 251]


def test_busi_frames_of_one_sweep_stay_in_one_split(shared_data: Path) -> None:
    records, splits, wide = real_splits(shared_data / "busi")
    assert not {wide[path] for path in splits.train} & {wide[path] for path in splits.test}
    whole, test = Counter(item.label for item in records), labels_of(records, splits.test)
    assert all(abs(test[name] - 0.3 * count) < 0.02 * count for name, count in whole.items())
    assert {"all/benign/benign (131).jpg", "all/malignant/malignant (51).jpg"} <= set(splits.conflicting)
