"""Claims about the cache of masks."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfocus.images import decode
from medfocus.masks import candidates, store
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.published import PublishedMasks, publish
from medfocus.masks.sam2.segmenter import load_sam2
from medfocus.masks.segmenter import Mask, Segmenter, identity
from medfocus.masks.settings import Sam2Settings
from medfocus.masks.store import MaskStore, cache_masks
from tests.segmenters import Counting, write_images

SHA = hashlib.sha256(b"an image").hexdigest()


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 65)])
@pytest.mark.parametrize("status", ["chosen", "relaxed", "box", "identity"])
def test_the_store_returns_a_mask_unchanged(tmp_path: Path, shape: tuple[int, int], status: str) -> None:
    region = np.random.default_rng(0).random(shape) < 0.5
    kept = MaskStore(tmp_path)
    assert kept.get(SHA, "key") is None
    kept.put({SHA: Mask(region, 0.3, status)}, "key")
    mask = kept.get(SHA, "key")
    assert mask is not None
    assert np.array_equal(mask.region, region)
    assert mask.region.dtype == bool
    assert (mask.score, mask.status) == (0.3, status)
    assert kept.get(SHA, "another segmenter") is None
    assert kept.get(SHA[::-1], "key") is None


def test_a_mask_is_an_image_in_a_zip_named_by_its_images_sha256(tmp_path: Path) -> None:
    MaskStore(tmp_path).put({SHA: identity(5, 6)}, "key")
    (path,) = tmp_path.rglob("*.zip")
    with zipfile.ZipFile(path) as shard, Image.open(shard.open(f"{SHA}.png")) as image:
        assert (image.mode, image.size, image.info["status"]) == ("1", (6, 5), "identity")


def test_the_last_digits_of_score_and_coverage_do_not_change_a_masks_bytes() -> None:
    region = np.arange(30).reshape(5, 6) < 10
    data = store.encode_mask(Mask(region, 0.1 + 0.2, "chosen"))
    assert data == store.encode_mask(Mask(region, 0.3, "chosen"))
    assert store.read_facts(data) == ("chosen", "0.300", "0.3333")


def test_only_a_damaged_mask_is_computed_again(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 6)
    kept = MaskStore(tmp_path / "cache")
    cache_masks(images, Counting(), kept, batch_size=2)
    (path,) = (tmp_path / "cache").rglob("*.zip")
    data = path.read_bytes()
    at = data.index(b"IHDR", data.index(f"{images[3][0].sha256}.png".encode())) + 9
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for one in (kept, MaskStore(tmp_path / "cache")):
        assert cache_masks(images, Counting(), one, batch_size=2).computed == (1 if one is kept else 0)
    publish([record for record, _ in images], kept, "counting", tmp_path / "masks")
    masks = PublishedMasks(tmp_path / "masks")
    for record, image in images:
        assert np.array_equal(masks[record.sha256], decode.read(image)[:, :, 0] > 127)


def test_only_missing_masks_are_computed(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 10)
    kept, segmenter, finished = MaskStore(tmp_path / "cache"), Counting(), []
    assert cache_masks(images[:6], segmenter, kept, batch_size=4) == store.Cached(6, 0)
    assert cache_masks(images, segmenter, kept, batch_size=4, progress=finished.append) == store.Cached(4, 6)
    assert cache_masks(images, segmenter, kept, batch_size=4) == store.Cached(0, 10)
    assert sum(finished) == 10
    for record, path in images:
        mask = kept.get(record.sha256, segmenter.key)
        assert mask is not None
        assert np.array_equal(mask.region, decode.read(path)[:, :, 0] > 127)


def test_the_segmenter_always_gets_full_batches(tmp_path: Path) -> None:
    segmenter = Counting()
    cache_masks(write_images(tmp_path / "in", 6), segmenter, MaskStore(tmp_path / "c"), batch_size=4)
    assert segmenter.batches == [4, 4]


def test_identical_bytes_are_segmented_once(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 1)
    record, path = images[0]
    copies = [(replace(record, path=f"copy{i}.png"), path) for i in range(9)]
    done = cache_masks(images + copies, Counting(), MaskStore(tmp_path / "c"), batch_size=2)
    assert done == store.Cached(computed=1, reused=9)


def test_images_are_decoded_at_most_two_batches_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    read = decode.decode

    def counted(data: bytes, name: str) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return read(data, name)

    monkeypatch.setattr(decode, "decode", counted)

    class Watching(Counting):
        ahead = 0

        def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
            time.sleep(0.01)  # time to decode too much
            self.ahead = max(self.ahead, decoded - sum(self.batches))
            return super().segment(images)

    segmenter = Watching()
    cache_masks(write_images(tmp_path / "in", 40), segmenter, MaskStore(tmp_path / "c"), batch_size=4)
    assert 4 < segmenter.ahead <= 8


def test_after_a_failure_a_second_run_computes_only_the_rest(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 12)
    kept = MaskStore(tmp_path / "cache")
    with pytest.raises(RuntimeError, match="switched off"):
        cache_masks(images, Counting(fail_at=2), kept, batch_size=3)
    segmenter = Counting()
    assert cache_masks(images, segmenter, kept, batch_size=3) == store.Cached(computed=6, reused=6)


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from medfocus.masks.segmenter import Mask
from medfocus.masks.store import MaskStore, cache_masks
from medfocus.datasets.records import read_manifest

class Slow:
    key = "slow"
    def segment(self, images):
        time.sleep(0.3)
        with open(sys.argv[2], "a") as log:
            log.write("%d\\n" % len(images))
        return [Mask(image[:, :, 0] > 127, 0.5, "chosen") for image in images]

folder = Path(sys.argv[1])
images = ((record, folder / record.path) for record in read_manifest(folder / "manifest.csv"))
done = cache_masks(images, Slow(), MaskStore(folder / "cache"), batch_size=2)
print(done.computed, done.reused)
"""


def test_a_killed_and_restarted_run_neither_loses_nor_repeats_a_finished_mask(tmp_path: Path) -> None:
    from medfocus.datasets.records import write_manifest

    images = write_images(tmp_path, 60)
    write_manifest([record for record, _ in images], tmp_path / "manifest.csv")
    log = tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(Path(candidates.__file__).parents[2])}
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().split()) >= 7):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = MaskStore(tmp_path / "cache")
    survived = len(dict(kept.encoded((record.sha256 for record, _ in images), "slow")))
    segmented = sum(map(int, log.read_text().split()))
    assert 6 <= survived <= 40
    assert segmented - survived <= 2 * 3  # the batch in work, and those of half a second
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert second.stdout.split() == [str(60 - survived), str(survived)]


def test_an_image_that_differs_from_the_manifest_is_refused(tmp_path: Path) -> None:
    ((record, path),) = write_images(tmp_path, 1)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"0000.png: its bytes differ from the manifest.s sha256"):
        cache_masks([(record, path)], Counting(), MaskStore(tmp_path / "c"), batch_size=1)


def test_a_segmenter_that_changes_the_size_is_refused(tmp_path: Path) -> None:
    class Careless(Counting):
        def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
            return [identity(3, 3) for _ in images]

    with pytest.raises(
        ValueError, match=r"0000.png: the segmenter returned a mask of \(3, 3\) for an image of \(24"
    ):
        cache_masks(write_images(tmp_path, 1), Careless(), MaskStore(tmp_path / "c"), batch_size=1)


def test_real_segmenters_work_with_the_cache(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 5)
    settings = Sam2Settings("pocket", "random:0", 128, "grid", points_per_side=2)
    segmenters: list[Segmenter] = [OtsuSegmenter(), load_sam2(settings, batch_size=2)]
    for segmenter in segmenters:
        done = cache_masks(images, segmenter, MaskStore(tmp_path / "cache"), batch_size=2)
        assert done == store.Cached(5, 0)


def test_a_mask_with_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = store.encode_mask(identity(40, 40))
    monkeypatch.setattr(decode, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="mask: has 40 x 40 pixels"):
        store.decode_mask(data)


def test_the_mask_store_imports_no_torch() -> None:
    modules = "medfocus.masks.store, medfocus.masks.otsu, medfocus.focus.modes"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(candidates.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
