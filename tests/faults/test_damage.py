"""Claims about damaged and half-written files: they are detected and computed again with the same bytes."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import IO, Any, TextIO

import pytest
from dvc.utils.serialize import _yaml

from flows.stages import duplicates, dvc, finetune, ingest, masks, phantoms, splits
from flows.study import costs
from medfocus.clip import features
from medfocus.storage import atomic
from medfocus.storage.shards import Shards
from tests.faults import state


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Cut a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_sealed_file_is_sound_only_with_its_hash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cell.safetensors"
    assert not atomic.is_sound(path)
    path.write_bytes(b"a file without a seal")
    assert atomic.is_sound(path)
    for number in range(40):
        with atomic.sealed_file(path) as temporary:
            temporary.write_bytes(b"forty bytes of a finished checkpoint....")
        assert atomic.is_sound(path) and not temporary.exists()
        flip(path, number)
        assert not atomic.is_sound(path)
    assert caplog.text.count(f"{path} is damaged") == 40


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    atomic.write(path, "first")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            atomic.write(path, "second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_damaged_cost_file_counts_as_missing(tmp_path: Path) -> None:
    costs.write(costs.FitCost(1.5, None, 7, ""), tmp_path / "cell.safetensors")
    note = tmp_path / "cell.json"
    assert costs.read(tmp_path / "cell.safetensors") == costs.FitCost(1.5, None, 7, "")
    for content in ("", note.read_text()[:20], "{}"):
        note.write_text(content)
        assert costs.read(tmp_path / "cell.safetensors") is None


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run the fits in this process; return the list of their checkpoints."""
    fitted: list[Path] = []
    fit = finetune.fit

    def noted(job: finetune.FitJob) -> None:
        fitted.append(job.path)
        fit(job)

    monkeypatch.setattr(finetune, "fit", noted)
    monkeypatch.setattr(finetune, "_end_with_parent", lambda: None)
    monkeypatch.setattr(finetune, "_workers_that_end", contextlib.nullcontext)
    monkeypatch.setattr(finetune, "parallel_config", lambda *_, **__: contextlib.nullcontext())
    return fitted


def published() -> dict[str, bytes]:
    """Return the masks and checkpoints that later stages read."""
    folders = (Path("data/masks"), Path("data/checkpoints"))
    return {
        str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()
    }


def test_a_damaged_cache_is_computed_again_with_the_same_bytes(
    project: Path,
    in_this_process: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (project / "data/phantoms/.breast_ultrasound-abcdefgh/images").mkdir(parents=True)  # left by a killed run
    phantoms.main(["--modality", "breast_ultrasound"])
    for stage in (ingest, duplicates, splits, masks):
        stage.main(["--dataset", "phantom-breast"])
    finetune.main([])
    complete = published()
    assert len(in_this_process) == 17
    (project / "data/.checkpoints.1").mkdir()  # left by a killed run
    (project / "data/masks/.phantom-breast.abcdefgh.old").mkdir()

    cells = sorted(in_this_process)
    flip(cells[0], -1)
    cut(cells[1])
    cut(cells[2].with_suffix(".json"))
    (shard,) = (project / ".cache/masks").rglob("*.zip")
    flip(shard, shard.read_bytes().index(b"IDAT") + 6)
    tables = sorted((project / ".cache/features").rglob("*.zip"))
    flip(tables[0], tables[0].stat().st_size // 3)
    cut(tables[1])
    in_this_process.clear()
    made: list[str] = []
    put = Shards.put

    def noted(self: Shards, entries: Any) -> None:
        entries = list(entries)
        made.extend(key for key, _ in entries)
        put(self, entries)

    monkeypatch.setattr(Shards, "put", noted)
    features._opened.cache_clear()  # as in a new process
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        masks.main(["--dataset", "phantom-breast"])
        assert len(made) == 1, "one mask was damaged, so one is computed"
        finetune.main([])
    assert sorted(in_this_process) == cells[:2]
    assert published() == complete
    for damaged in (cells[0], cells[1], shard):
        assert f"{damaged} is damaged" in caplog.text
    assert not [path for path in (project / "data").rglob(".*") if path.is_dir()]


class Killed(BaseException):
    """An end of the process that DVC's error handlers do not see."""


def test_a_kill_while_dvc_clones_a_file_leaves_no_empty_object_in_its_cache(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    stage = "phantoms@breast_ultrasound"
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.ioctl", killed)
        with pytest.raises(Killed):
            dvc.reproduce(project, stage)
    tried = [path for path in (project / ".dvc/cache").rglob("*.tmp") if path.stat().st_size == 0]
    assert len(tried) == 1  # the kill happened here
    assert state.damaged(project) == []
    assert dvc.reproduce(project, stage)
    assert state.damaged(project) == []


def test_a_kill_while_dvc_writes_its_locks_leaves_the_earlier_file(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(content: object, file: IO[str]) -> None:
        file.write('{"write": {"da')
        file.flush()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("dvc.rwlock.json.dump", half)
        with pytest.raises(Killed):
            dvc.reproduce(project, "phantoms@breast_ultrasound")
    assert state.damaged(project) == [] and not list((project / ".dvc/tmp").glob(".rwlock*"))
    assert dvc.reproduce(project, "phantoms@breast_ultrasound")


@pytest.mark.parametrize("left", ["", "schema: '2.0'\nstages:\n  a:\n    cmd: 'pyt", "<<<<<<< ours\n"])
def test_a_damaged_dvc_lock_is_set_aside_and_written_again(
    project: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    stage = "phantoms@breast_ultrasound"
    assert dvc.reproduce(project, stage)
    lock = project / "dvc.lock"
    complete = lock.read_bytes()
    lock.write_text(left)
    (project / ".dvc/tmp/rwlock").write_text("")
    dvc.reproduce(project, stage)
    assert lock.read_bytes() == complete
    assert "dvc.lock was damaged and is written again" in capsys.readouterr().err
    assert (project / "dvc.lock.damaged").read_text() == left
    assert not dvc.reproduce(project, stage)


def test_a_kill_while_dvc_writes_dvc_lock_leaves_the_one_before(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dvc.reproduce(project, "phantoms@breast_ultrasound")
    lock = project / "dvc.lock"
    before = lock.read_bytes()
    dump = _yaml._dump

    def half(content: dict[str, object], file: TextIO) -> None:
        if "schema" in content:
            file.write("schema: '2.0'\nstages:\n")  # valid YAML without a stage
            file.flush()
            raise Killed
        dump(content, file)  # the entry of the run cache, which DVC writes atomically

    with monkeypatch.context() as patch:
        patch.setattr(_yaml, "_dump", half)
        with pytest.raises(Killed):
            dvc.reproduce(project, "ingest@phantom-breast")
    assert lock.read_bytes() == before and not list(project.glob(".dvc.lock*"))
    assert state.damaged(project) == []
    assert dvc.reproduce(project, "ingest@phantom-breast")


def test_stages_that_a_killed_dvc_repro_cut_off_dvc_lock_come_back_from_the_run_cache(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("phantoms@breast_ultrasound", "ingest@phantom-breast")
    for name in names:
        assert dvc.reproduce(project, name)
    lock = project / "dvc.lock"
    complete = lock.read_text()
    lock.write_text(complete[: complete.index("  ingest@phantom-breast:")])
    monkeypatch.delattr(phantoms, "main")
    monkeypatch.delattr(ingest, "main")
    for name in names:
        dvc.reproduce(project, name)
    assert lock.read_text() == complete


def test_an_empty_object_that_a_killed_dvc_repro_left_is_made_again(project: Path) -> None:
    stage = "phantoms@breast_ultrasound"
    assert dvc.reproduce(project, stage)
    objects = [path for path in (project / ".dvc/cache/files").rglob("*") if path.is_file()]
    for path in objects:
        path.unlink()
        path.touch()  # writable: DVC trusts read-only objects alone
    assert len(state.damaged(project)) == len(objects)
    (project / "dvc.lock").unlink()
    dvc.reproduce(project, stage)
    assert state.damaged(project) == []
