"""Copies are found under every change, and different images are not taken for copies."""

from __future__ import annotations

import csv
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.Image import Transpose
from scipy.ndimage import gaussian_filter

from medfocus.datasets.duplicates import (
    Pair,
    find_duplicates,
    groups,
    match,
    read_pairs,
    twins,
    write_pairs,
)
from medfocus.datasets.ingest import ingest
from medfocus.datasets.records import Record

# The operation that makes image b from image a, and the kind of pair to find.
TURNS = {
    Transpose.FLIP_LEFT_RIGHT: "mirrored",
    Transpose.FLIP_TOP_BOTTOM: "flipped",
    Transpose.ROTATE_180: "turned-180",
    Transpose.ROTATE_90: "turned-270",
    Transpose.ROTATE_270: "turned-90",
    Transpose.TRANSPOSE: "transposed",
    Transpose.TRANSVERSE: "transversed",
}


def texture(seed: int, side: int = 160) -> Image.Image:
    """A grey image with structure on every scale, like anatomy."""
    rng = np.random.default_rng(seed)
    layers = [gaussian_filter(rng.normal(size=(side, side)), sigma) * sigma for sigma in (1, 3, 9)]
    values = np.sum(layers, axis=0)
    values = (values - values.min()) / (values.max() - values.min()) * 255
    return Image.fromarray(values.astype(np.uint8))


def record(path: str, data: bytes = b"", label: str = "cat", split: str = "", patient: str = "") -> Record:
    return Record(path, hashlib.sha256(data or path.encode()).hexdigest(), 1, 1, "L", label, split, patient)


def saved(root: Path, images: dict[str, Image.Image]) -> list[Record]:
    """Write images by name, in the format of the suffix, and return their records."""
    for name, image in images.items():
        image.save(root / name)
    return [record(name, (root / name).read_bytes()) for name in images]


def pair(a: str, b: str, kind: str = "re-encoded") -> Pair:
    return Pair(a, b, kind, 0.9, "", "", "cat", "cat")


@pytest.mark.parametrize(("turn", "kind"), TURNS.items())
def test_each_of_the_seven_flips_and_rotations_is_found_and_named(
    tmp_path: Path, turn: Transpose, kind: str
) -> None:
    a = texture(0)
    pairs = find_duplicates(saved(tmp_path, {"a.png": a, "b.jpg": a.transpose(turn)}), tmp_path)
    assert [(p.path_a, p.path_b, p.kind) for p in pairs] == [("a.png", "b.jpg", kind)]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.resize((100, 70)),
        lambda a: a.convert("RGB"),
        lambda a: a.point(lambda v: int(255 * (v / 255) ** 0.5)),
        lambda a: a.point(lambda v: min(255, max(0, int((v - 60) * 1.8)))),
        lambda a: a.filter(ImageFilter.UnsharpMask(3, 200, 0)),
    ],
    ids=["resized", "colour", "gamma", "windowed", "sharpened"],
)
def test_another_encoding_or_tone_is_found_as_a_copy(
    tmp_path: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    images = {"a.png": texture(0), "b.jpg": change(texture(0)), "c.png": texture(1)}
    (found,) = find_duplicates(saved(tmp_path, images), tmp_path)
    assert (found.path_a, found.path_b, found.kind) == ("a.png", "b.jpg", "re-encoded")
    assert 0.8 <= found.similarity <= 1


def test_a_blurred_copy_is_near() -> None:
    sharp, blurred = texture(0), texture(0).filter(ImageFilter.GaussianBlur(3))
    thumbnails = np.stack([np.asarray(image.resize((64, 64))) for image in (sharp, blurred)])
    ((i, j, kind, similarity),) = match(thumbnails)
    assert (i, j, kind) == (0, 1, "near")
    assert similarity >= 0.7


def test_equal_bytes_are_identical_even_if_blank(tmp_path: Path) -> None:
    blank = Image.new("L", (40, 40), 128)
    images = {"a.png": blank, "b.png": blank, "c.bmp": blank, "d.png": texture(0), "e.png": texture(0)}
    pairs = find_duplicates(saved(tmp_path, images), tmp_path)
    assert [(p.path_a, p.path_b, p.kind, p.similarity) for p in pairs] == [
        ("a.png", "b.png", "identical", 1.0),
        ("d.png", "e.png", "identical", 1.0),
    ]


def test_blank_and_nearly_blank_images_are_not_twins() -> None:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    blank = [np.full((64, 64), value, dtype=np.uint8) for value in (0, 128, 255)]
    rng = np.random.default_rng(0)
    noisy = [128 + (rng.random((64, 64)) < 0.01).astype(np.uint8) for _ in range(3)]
    assert match(np.stack([*blank, *noisy, np.tile(ramp, (64, 1)), np.tile(ramp // 2, (64, 1))])) == []


def test_a_hundred_different_images_have_no_pair() -> None:
    thumbnails = np.stack([np.asarray(texture(seed).resize((64, 64))) for seed in range(100)])
    assert match(thumbnails) == []


def test_order_of_records_does_not_matter(tmp_path: Path) -> None:
    a = texture(0)
    records = saved(tmp_path, {"a.png": a, "b.png": a.transpose(Transpose.ROTATE_90), "c.jpg": a})
    assert find_duplicates(records, tmp_path) == find_duplicates(records[::-1], tmp_path)
    assert find_duplicates([], tmp_path) == []


def test_an_image_is_opened_once(tmp_path: Path) -> None:
    a, root, cache = texture(0), tmp_path / "set", tmp_path / "cache"
    root.mkdir()
    records = saved(root, {"a.png": a, "b.png": a.transpose(Transpose.ROTATE_90), "c.jpg": texture(2)})
    first = find_duplicates(records, root, cache=cache)
    assert first == find_duplicates(records, root) and len(first) == 1
    for record in records:
        (root / record.path).unlink()
    assert find_duplicates(records, root, cache=cache) == first
    records += saved(root, {"d.png": a.transpose(Transpose.FLIP_LEFT_RIGHT)})
    assert len(find_duplicates(records, root, cache=cache)) == 3


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"x\.png: is not in a supported image format"):
        find_duplicates([record("x.png")], tmp_path)


def seen_in_training(records: list[Record], pairs: list[Pair]) -> list[str]:
    """Test images with a twin in train or val, directly or through other images."""
    group = groups(records, twins(pairs))
    seen = {group[record.path] for record in records if record.split in ("train", "val")}
    return sorted(record.path for record in records if record.split == "test" and group[record.path] in seen)


def test_groups_are_connected_components_numbered_by_first_path() -> None:
    records = [record(name) for name in "edcba"]
    found = groups(records, [pair("b", "d"), pair("d", "e")])
    assert found == {"a": 0, "b": 1, "c": 2, "d": 1, "e": 1}
    assert groups(records, []) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}


def test_twins_are_the_pairs_that_are_not_near() -> None:
    copy, near = pair("test/c", "train/a"), pair("test/e", "train/a", "near")
    assert twins([copy, near]) == [copy]


def test_pairs_are_written_with_their_splits_and_labels(tmp_path: Path) -> None:
    near = Pair("a", "b", "near", 0.71239, "train", "test", "x", "y")
    write_pairs([near], tmp_path / "duplicates.csv")
    assert read_pairs(tmp_path / "duplicates.csv") == [replace(near, similarity=0.712)]
    with (tmp_path / "duplicates.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines == [
        ["path_a", "path_b", "kind", "similarity", "split_a", "split_b", "label_a", "label_b"],
        ["a", "b", "near", "0.712", "train", "test", "x", "y"],
    ]


def test_radiographs_of_different_people_are_not_twins(shared_data: Path) -> None:
    """tb_cxr has one radiograph per patient; in pneumonia_cxr only copies with equal bytes are known."""
    tb, pneumonia = shared_data / "tb_cxr", shared_data / "pneumonia_cxr"
    assert find_duplicates(ingest(tb).records, tb) == []
    records = ingest(pneumonia).records
    pairs = find_duplicates(records, pneumonia)
    assert Counter(p.kind for p in pairs) == {"identical": 7}
    assert seen_in_training(records, pairs) == []


def test_known_twins_of_covid19_are_found(shared_data: Path) -> None:
    root = shared_data / "covid19"
    records = ingest(root).records
    pairs = find_duplicates(records, root)
    across = seen_in_training(records, pairs)
    # Eight are known; the ninth is test/Covid/0100.jpg, a training radiograph with an arrow drawn on it.
    assert len(across) == 9
    assert "test/Covid/0100.jpg" in across
    identical = [p for p in pairs if p.kind == "identical" and p.split_a != p.split_b]
    assert len(identical) == 6
    assert not [p for p in pairs if p.label_a != p.label_b]


def test_known_groups_of_busi_are_found(shared_data: Path) -> None:
    root = shared_data / "busi"
    known: dict[str, list[str]] = {}
    with (root / "splits_suggested.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["dup_group"].strip():
                known.setdefault(row["dup_group"], []).append(row["file"].replace(".png", ".jpg"))
    files = sorted(path.relative_to(root).as_posix() for path in (root / "all").rglob("*.jpg"))
    records = [record(path, (root / path).read_bytes(), path.split("/")[1]) for path in files]
    pairs = find_duplicates(records, root)
    listed = {(p.path_a, p.path_b) for p in pairs}
    expected = {tuple(sorted(two)) for group in known.values() for two in combinations(group, 2)}
    assert len(known) == 33
    assert expected <= listed
    torn = {frozenset((p.path_a, p.path_b)) for p in twins(pairs) if p.label_a != p.label_b}
    assert {"all/benign/benign (433).jpg", "all/malignant/malignant (145).jpg"} in torn
    assert max(Counter(groups(records, pairs).values()).values()) < 10


def test_brain_tumor_twins_are_found_in_under_two_minutes(shared_data: Path) -> None:
    """992 test images are known copies of a training slice: identical, mirrored or rotated by 180 degrees."""
    root = shared_data / "brain_tumor"
    records = ingest(root).records
    start = time.perf_counter()
    pairs = find_duplicates(records, root)
    assert time.perf_counter() - start < 120
    across = Counter(path.split("/")[1] for path in seen_in_training(records, pairs))
    known = {"notumor": 403, "meningioma": 289, "pituitary": 219, "glioma": 81}
    for name, count in known.items():
        assert count <= across[name] <= count + 12, name
    kinds = Counter(p.kind for p in pairs)
    assert kinds.keys() == {"identical", "re-encoded", "mirrored", "flipped", "turned-180", "near"}
    # The largest groups are augmented copies of one slice, not chains of different images.
    assert max(Counter(groups(records, pairs).values()).values()) < 100
    torn = {tuple(sorted((p.label_a, p.label_b))) for p in twins(pairs) if p.label_a != p.label_b}
    assert torn == {("meningioma", "pituitary")}
