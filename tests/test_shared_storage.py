"""Claims about caches on S3, with a real server on loopback."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from medfocus.clip import features
from medfocus.datasets.records import Record
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.published import PublishedMasks, publish
from medfocus.masks.store import Cached, MaskStore, cache_masks
from medfocus.storage.shards import Shards

ENTRIES = {hashlib.sha256(bytes([i])).hexdigest(): bytes([i]) * 300 for i in range(30)}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; the environment has the credentials, as a user's would."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    name = f"cache-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/medfocus"


def test_entries_are_read_back_and_a_shard_appears_complete(bucket: str) -> None:
    assert dict(Shards(bucket).read(ENTRIES)) == {}
    writer = Shards(bucket)
    writer.put(ENTRIES.items())
    writer.close()
    assert dict(Shards(bucket).read(ENTRIES)) == ENTRIES
    files = fsspec.filesystem("s3", skip_instance_cache=True).find(bucket)
    assert len(files) == 1 and files[0].endswith(".zip")


WRITER = """
import hashlib, sys
from medfocus.storage import shards
shards.FLUSH_SECONDS, shards.PIECES = 0.0, 4
writer = shards.Shards(sys.argv[1])
for number in range(30):
    if number % 3 != int(sys.argv[2]):  # each writes two thirds, so some are written twice
        writer.put([(hashlib.sha256(bytes([number])).hexdigest(), bytes([number]) * 300)])
writer.close()
"""


def test_two_concurrent_writers_lose_no_entry(bucket: str) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, bucket, part]) for part in "01"]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert dict(Shards(bucket).read(ENTRIES)) == ENTRIES
    names = fsspec.filesystem("s3", skip_instance_cache=True).find(bucket)
    assert names and all(name.endswith(".zip") for name in names)


def test_masks_and_features_on_s3_equal_those_in_a_folder(bucket: str, tmp_path: Path) -> None:
    images = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        shade = np.random.default_rng(i).integers(0, 256, (20, 24), dtype=np.uint8)
        Image.fromarray(shade).convert("RGB").save(path)
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        images.append((Record(path.name, sha, 24, 20, "RGB", "any", "train", ""), path))
    rows, views = {}, {}
    for name, cache in (("s3", bucket), ("folder", str(tmp_path / "cache"))):
        segmenter = OtsuSegmenter()
        for expected in (Cached(5, 0), Cached(0, 5)):
            assert cache_masks(images, segmenter, MaskStore(f"{cache}/masks"), batch_size=2) == expected
        publish([record for record, _ in images], MaskStore(f"{cache}/masks"), segmenter.key, tmp_path / name)
        masks = PublishedMasks(tmp_path / name)
        views[name] = json.dumps([masks[record.sha256].tolist() for record, _ in images])
        for attempt in range(2):
            rows[name, attempt] = features.encode(
                range(5),
                [record.sha256 for record, _ in images],
                lambda i: np.full((4, 4, 3), i, np.uint8),
                lambda views: views.float().mean(dim=(1, 2)),
                cache=f"{cache}/features",
                settings="mean",
                batch_size=2,
            )
    assert views["s3"] == views["folder"]
    assert all(torch.equal(table, rows["folder", 0]) for table in rows.values())


def test_a_missing_bucket_is_named_and_not_created(server: str, bucket: str) -> None:
    shards = Shards("s3://mispelt-bucket/masks")
    message = r"mispelt-bucket/masks: cannot be written \(.* does not exist\)\. .* scale\.cache"
    with pytest.raises(OSError, match=message):
        shards.put(ENTRIES.items())
    assert not fsspec.filesystem("s3", skip_instance_cache=True).exists("mispelt-bucket")
