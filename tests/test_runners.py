"""Claims about work in shards: all runners give the same bytes, and a killed worker costs only its shard."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flows.stages import finetune, masks
from flows.stages.dvc import reproduce
from flows.study.params import ScaleParams
from flows.study.runners import by_shards
from medfocus.storage.shards import Shards

STAGES = ("phantoms@breast_ultrasound", *(f"{s}@phantom-breast" for s in ("ingest", "duplicates", "splits")))


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def kept(cache: Path) -> dict[str, bytes]:
    """Return every entry of a cache, with its folder and name."""
    entries = {}
    for folder in sorted(path for path in cache.iterdir() if path.is_dir()):
        shards = Shards(folder, suffix=".png" if cache.name == "masks" else ".npy")
        shards._look()
        names = [name.hex() for name in shards._places]
        entries |= {f"{folder.name}/{name}": content for name, content in shards.read(names)}
    return entries


def test_masks_features_and_checkpoints_are_the_same_bytes_with_every_runner(
    project: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load((project / "params.yaml").read_text())
    content["masks"] |= {"segmenter": "sam2", "batch_size": 4}
    content["study"] |= {"methods": {"medfocusclip": ["none"]}, "percents": [50], "seeds": [0]}
    content["views"] |= {"batch_size": 8}
    content["report"] |= {"baseline": "medfocusclip"}
    made: dict[str, dict[str, bytes]] = {}
    for runner, workers, images in (
        ("here", 1, 500),
        ("threads", 2, 7),
        ("processes", 2, 11),
    ):
        shared = tmp_path / f"shared-{runner}"
        content["scale"] |= {"runner": runner, "workers": workers, "images": images, "cache": str(shared)}
        (project / "params.yaml").write_text(yaml.safe_dump(content))
        if runner == "here":
            for stage in STAGES:
                reproduce(project, stage)
        masks.main(["--dataset", "phantom-breast"])
        finetune.main([])
        outputs = [path for name in ("masks", "checkpoints") for path in Path("data", name).rglob("*")]
        made[runner] = {str(path): path.read_bytes() for path in outputs if path.is_file()}
        for kind in ("masks", "features"):
            made[runner] |= {f"{kind}/{name}": data for name, data in kept(shared / kind).items()}
        shutil.rmtree(project / ".cache" / "cells")
    assert len([name for name in made["here"] if name.startswith("masks/")]) == 39
    assert len([name for name in made["here"] if name.startswith("features/")]) == 12 * 2  # views
    for runner, of_runner in made.items():
        assert of_runner.keys() == made["here"].keys(), runner
        assert of_runner == made["here"], runner


def leaves_a_mark(job: tuple[Path, int]) -> int:
    folder, number = job
    with (folder / f"{number}.log").open("a") as log:
        log.write("x")
    if number == 3 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{number}.done").touch()
    return 10


def fails(job: tuple[Path, int]) -> int:
    leaves_a_mark(job)
    if job[1] == 1:
        raise ValueError("scan1.png: cut short")
    return 10


SCALE = ScaleParams(runner="processes", workers=2, images=10, address=None, cache=None)


@pytest.mark.parametrize("runner", ["processes", "dask"])
def test_only_the_shard_of_a_killed_worker_is_repeated(tmp_path: Path, runner: str) -> None:
    seen: list[int] = []
    by_shards(leaves_a_mark, [(tmp_path, i) for i in range(6)], replace(SCALE, runner=runner), seen.append)
    assert (tmp_path / "died").exists()
    assert sum(seen) == 60
    assert {path.stem for path in tmp_path.glob("*.done")} == set("012345")
    assert (tmp_path / "3.log").read_text() == "xx"


def test_a_fault_in_a_shard_is_the_error_of_the_run_and_the_other_shards_finish(tmp_path: Path) -> None:
    (tmp_path / "died").touch()
    with pytest.raises(ValueError, match=r"scan1\.png: cut short"):
        by_shards(fails, [(tmp_path, i) for i in range(4)], replace(SCALE, runner="threads"), lambda _: None)
    assert {path.stem for path in tmp_path.glob("*.done")} == set("0123")
    assert (tmp_path / "1.log").read_text() == "xx" and (tmp_path / "2.log").read_text() == "x"
