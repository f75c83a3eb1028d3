"""The cache of shards loses no written entry and returns no damaged one."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from medfocus.storage import shards as module
from medfocus.storage.shards import Shards
from tests.conftest import run_forked

ENTRIES = {hashlib.sha256(bytes([i])).hexdigest(): bytes([i]) * (10 * i) for i in range(40)}
KEYS = list(ENTRIES)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write every put at once, and look for new shards at every miss."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"))


def filled(url: str | Path, keys: list[str] = KEYS) -> Shards:
    shards = Shards(url)
    shards.put((key, ENTRIES[key]) for key in keys)
    shards.close()
    return shards


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_every_reader_gets_the_entries_that_were_put(tmp_path: Path, kind: str) -> None:
    url = tmp_path if kind == "folder" else f"memory://{uuid.uuid4().hex}"
    assert dict(Shards(url).read(KEYS)) == {}
    writer = filled(url, KEYS[:30])
    assert dict(writer.read(KEYS)) == dict(Shards(url).read(KEYS)) == {key: ENTRIES[key] for key in KEYS[:30]}


def test_waiting_entries_can_be_read(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.put([(KEYS[0], b"written at once")])
    shards.put([(KEYS[1], b"waiting")])
    assert dict(shards.read(KEYS)) == {KEYS[0]: b"written at once", KEYS[1]: b"waiting"}
    assert dict(Shards(tmp_path).read(KEYS)) == {KEYS[0]: b"written at once"}
    shards.close()
    assert len(dict(Shards(tmp_path).read(KEYS))) == 2


def test_a_shard_is_a_plain_zip_of_named_entries(tmp_path: Path) -> None:
    shards = Shards(tmp_path, suffix=".bin")
    shards.put(ENTRIES.items())
    (path,) = files(tmp_path)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.namelist() == sorted(f"{key}.bin" for key in KEYS)


@pytest.mark.usefixtures("eager")
def test_small_shards_are_merged_and_stay_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECES", 8)
    writer, early = Shards(tmp_path), Shards(tmp_path)
    for i, key in enumerate(KEYS):
        writer.put([(key, ENTRIES[key])])
        assert dict(early.read(KEYS)) == {key: ENTRIES[key] for key in KEYS[: i + 1]}
        assert len(files(tmp_path)) <= 8
    writer.close()
    assert len(files(tmp_path)) == 1
    assert dict(early.read(KEYS)) == dict(writer.read(KEYS)) == ENTRIES


@pytest.mark.usefixtures("eager")
def test_a_full_shard_is_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECES", 4)
    monkeypatch.setattr(module, "SHARD_ENTRIES", 10)
    writer = Shards(tmp_path)
    written: list[int] = []
    write = writer._write
    monkeypatch.setattr(writer, "_write", lambda entries: (written.append(len(entries)), write(entries))[1])
    for key in KEYS:
        writer.put([(key, ENTRIES[key])])
    writer.close()
    assert dict(Shards(tmp_path).read(KEYS)) == ENTRIES
    sizes = []
    for path in files(tmp_path):
        with zipfile.ZipFile(path) as file:
            sizes.append(len(file.namelist()))
    assert sorted(sizes) == [10, 10, 10, 10]
    assert sum(written) <= 5 * len(KEYS)


@pytest.mark.usefixtures("eager")
def test_a_lookup_opens_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in range(0, 40, 10):
        filled(tmp_path, KEYS[start : start + 10])
    reader = Shards(tmp_path)
    assert dict(reader.read(KEYS)) == ENTRIES
    asked: list[str] = []
    read = reader._files.cat_ranges
    monkeypatch.setattr(
        reader._files, "cat_ranges", lambda paths, *a, **k: (asked.extend(paths), read(paths, *a, **k))[1]
    )
    assert dict(reader.read([KEYS[17]])) == {KEYS[17]: ENTRIES[KEYS[17]]}
    assert len(asked) == 1


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_a_flipped_bit_costs_only_the_entries_it_damages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path / "whole", KEYS[:8])
    (source,) = files(tmp_path / "whole")
    whole = source.read_bytes()
    (tmp_path / "c").mkdir()
    warnings = 0
    for at in range(0, len(whole), 7):
        for path in files(tmp_path / "c"):
            path.unlink()
        (tmp_path / "c" / "0.zip").write_bytes(flipped(whole, at))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = dict(Shards(tmp_path / "c").read(KEYS))
        assert all(content == ENTRIES[key] for key, content in found.items())
        lost = [key for key in KEYS[:8] if key not in found]
        warnings += "computed again" in caplog.text
        again = filled(tmp_path / "c", lost)
        assert dict(again.read(KEYS[:8])) == {key: ENTRIES[key] for key in KEYS[:8]}
        assert dict(Shards(tmp_path / "c").read(KEYS[:8])) == {key: ENTRIES[key] for key in KEYS[:8]}
    assert warnings > 30


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"\0" * 300, "cut"])
def test_a_file_that_is_not_a_shard_is_logged_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | str
) -> None:
    filled(tmp_path)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-9] if isinstance(content, str) else content)
    with caplog.at_level(logging.WARNING):
        assert dict(Shards(tmp_path).read(KEYS)) == {}
    assert f"{path} is damaged (" in caplog.text and "computed again" in caplog.text
    assert files(tmp_path) == []


def test_an_entry_damaged_after_opening_is_not_returned(tmp_path: Path) -> None:
    shards = filled(tmp_path)
    assert dict(shards.read(KEYS)) == ENTRIES
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, whole.index(ENTRIES[KEYS[30]]) + 5))
    assert dict(shards.read(KEYS)) == {key: ENTRIES[key] for key in KEYS if key != KEYS[30]}
    path.unlink(missing_ok=True)


def test_a_cleared_cache_is_empty(tmp_path: Path) -> None:
    shards = filled(tmp_path)
    for path in files(tmp_path):
        path.unlink()
    assert dict(shards.read(KEYS)) == {}
    shards.put(ENTRIES.items())
    shards.close()
    assert dict(Shards(tmp_path).read(KEYS)) == ENTRIES


def test_a_full_disk_leaves_no_partial_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = filled(tmp_path, KEYS[:3])

    def fails(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._files, "pipe_file", fails)
    shards.put([(KEYS[5], b"x")])
    with pytest.raises(OSError, match="No space left"):
        shards.close()
    assert len(files(tmp_path)) == 1
    assert len(dict(Shards(tmp_path).read(KEYS))) == 3


def in_process(work: Callable[..., None], *arguments: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def put_until_killed(folder: Path) -> None:
    module.FLUSH_SECONDS, module.PIECES = 0.0, 3
    shards = Shards(folder)
    for i, key in enumerate(KEYS):
        shards.put([(key, ENTRIES[key])])
        (folder / "count").write_text(str(i + 1))
        if i == 16:
            os.kill(os.getpid(), signal.SIGKILL)


# Python 3.12 warns about forking a process with threads; spawning takes seconds.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_a_killed_process_loses_no_written_entry(tmp_path: Path) -> None:
    assert in_process(put_until_killed, tmp_path) == -9
    assert (tmp_path / "count").read_text() == "17"
    assert dict(Shards(tmp_path).read(KEYS)) == {key: ENTRIES[key] for key in KEYS[:17]}


def put_and_read(folder: Path, number: int) -> None:
    module.FLUSH_SECONDS = module.LOOK_SECONDS = 0.0
    module.PIECES = 3
    shards = Shards(folder)
    for key in KEYS[number:] + KEYS[:number]:
        if not dict(shards.read([key])):
            shards.put([(key, ENTRIES[key])])
        assert dict(shards.read([key])) == {key: ENTRIES[key]}
    shards.close()


@forks
def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_forked, args=(put_and_read, tmp_path, 11 * i)) for i in range(4)]
    threads = [threading.Thread(target=put_and_read, args=(tmp_path, 7 * i)) for i in range(2)]
    for one in [*processes, *threads]:
        one.start()
    for one in [*processes, *threads]:
        one.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert dict(Shards(tmp_path).read(KEYS)) == ENTRIES
    assert all(path.suffix == ".zip" for path in files(tmp_path))
