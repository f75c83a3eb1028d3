"""Claims about the published masks of a manifest."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from medfocus.datasets.records import Record
from medfocus.images import decode
from medfocus.masks import published as module
from medfocus.masks.published import MaskStatus, PublishedMasks, publish, summarise
from medfocus.masks.segmenter import Mask, identity
from medfocus.masks.store import MaskStore, cache_masks
from tests.segmenters import Counting, write_images


def published(tmp_path: Path, images: Sequence[tuple[Record, Path]], name: str = "masks") -> Path:
    kept = MaskStore(tmp_path / "cache")
    cache_masks(images, Counting(), kept, batch_size=4)
    publish([record for record, _ in images], kept, "counting", tmp_path / "data" / name)
    return tmp_path / "data" / name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_exactly_the_masks_of_the_manifest_are_published(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    published(tmp_path, images)
    masks = PublishedMasks(published(tmp_path, images[:3]))
    assert set(masks.status) == {record.path for record, _ in images[:3]}
    for record, path in images[:3]:
        assert np.array_equal(masks[record.sha256], decode.read(path)[:, :, 0] > 127)
    with pytest.raises(KeyError, match="no mask of an image with sha256"):
        masks[images[5][0].sha256]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["masks"]


def test_the_same_masks_give_the_same_published_bytes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    first = contents(published(tmp_path, images, "first"))
    second = contents(published(tmp_path, images[::-1], "second"))
    assert first == second
    assert set(first) == {"masks.zip", "mask_status.csv"}


def test_a_new_image_changes_only_its_own_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_SIZE", 5)
    images = write_images(tmp_path / "in", 33)
    before = contents(published(tmp_path, images[:-1], "before"))
    folder = published(tmp_path, images, "after")
    after = contents(folder)
    shards = [name for name in after if name.endswith(".zip")]
    assert len(shards) > 5
    changed = [name for name in shards if before.get(name) != after[name]]
    assert len(changed) == 1
    masks = PublishedMasks(folder)
    for record, path in images:
        assert np.array_equal(masks[record.sha256], decode.read(path)[:, :, 0] > 127)


def test_a_shard_is_a_plain_zip_of_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 3)
    with zipfile.ZipFile(published(tmp_path, images) / "masks.zip") as shard:
        assert shard.testzip() is None
        assert shard.namelist() == sorted(f"{record.sha256}.png" for record, _ in images)


def test_mask_status_lists_rung_score_and_coverage_of_every_image(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 2)
    with (published(tmp_path, images) / "mask_status.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    coverage = (decode.read(images[0][1])[:, :, 0] > 127).mean()
    assert rows[0] == {
        "path": "0000.png",
        "label": "even",
        "status": "chosen",
        "score": "0.500",
        "coverage": f"{coverage:.4f}",
    }


def test_a_fallback_that_goes_with_a_class_shows_in_the_summary(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 8)
    kept = MaskStore(tmp_path / "cache")
    for record, _ in images:
        fails = record.label == "odd"
        mask = identity(24, 29) if fails else Mask(np.arange(24 * 29).reshape(24, 29) % 4 == 0, 0.8, "chosen")
        kept.put({record.sha256: mask}, "key")
    publish([record for record, _ in images], kept, "key", tmp_path / "masks")
    even, odd = PublishedMasks(tmp_path / "masks").summary()
    assert even == {
        "label": "even", "images": 4, "coverage": pytest.approx(0.25), "score": pytest.approx(0.8),
        "chosen": 1.0, "relaxed": 0.0, "box": 0.0, "identity": 0.0,
    }  # fmt: skip
    assert (odd["identity"], odd["chosen"], odd["coverage"], odd["score"]) == (1.0, 0.0, 1.0, 0.0)


def test_a_summary_has_four_decimals() -> None:
    rows = [MaskStatus(str(i), "any", "box" if i else "chosen", 0.123, i / 3) for i in range(3)]
    (line,) = summarise(rows)
    assert (line["coverage"], line["score"]) == (0.3333, 0.123)
    assert (line["chosen"], line["box"]) == (0.3333, 0.6667)


def test_a_failed_publication_leaves_the_old_one_in_place(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 4)
    before = contents(published(tmp_path, images[:2]))
    kept = MaskStore(tmp_path / "cache")
    message = r"0002.png: the cache .* lacks its mask by this segmenter \(missing in all: 2\)"
    with pytest.raises(ValueError, match=message):
        publish([record for record, _ in images], kept, "counting", tmp_path / "data" / "masks")
    assert contents(tmp_path / "data" / "masks") == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["masks"]


def test_a_folder_without_published_masks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no mask_status.csv. Run the masks stage"):
        PublishedMasks(tmp_path)
