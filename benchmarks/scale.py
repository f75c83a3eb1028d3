"""Masks by shards: the image rate of every runner with 1, 2 and 4 workers.

Each row is the masks stage (`python -m flows.stages.masks`) on phantoms with the pocket SAM2, into an empty
cache, once with an image for each worker and once with all: the difference is the rate, the first is what
starting costs (Prefect's server, the workers, their libraries). Every worker computes with one thread,
and so does the stage without workers.

    python -m benchmarks.scale
    python -m benchmarks.scale --images 1000 --workers 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.clone import ROOT, clone

RUNNERS = ("threads", "processes", "dask")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--shard", type=int, default=25, help="images")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["datasets"] = {
        "archive": {**content["datasets"]["phantom-brain"], "root": "data/phantoms/brain_mri"}
    }
    train = -(-options.images // 4)  # of each of four classes
    drawn = {**content["phantoms"]["brain_mri"], "train_per_class": train, "test_per_class": 1}
    content["phantoms"] = {"brain_mri": drawn}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        environment = clone(project, content) | {"OMP_NUM_THREADS": "1"}
        for stage in (
            "phantoms --modality brain_mri",
            *(f"{s} --dataset archive" for s in ("ingest", "duplicates", "splits")),
        ):
            _run(stage, project, environment)
        manifest = project / "data" / "manifests" / "archive.csv"
        whole = manifest.read_text(encoding="utf-8")
        configurations = [("here", 1), *((runner, n) for runner in options.runners for n in options.workers)]
        for runner, workers in configurations:
            seconds = {}
            for count in (workers, options.images):
                content["scale"] |= {
                    "runner": runner,
                    "workers": workers,
                    "images": 1 if count == workers else options.shard,
                }
                content["scale"] |= {"cache": str(Path(folder, "cache"))}
                (project / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
                manifest.write_text("".join(whole.splitlines(keepends=True)[: 1 + count]), encoding="utf-8")
                seconds[count] = _run("masks --dataset archive", project, environment)
                shutil.rmtree(Path(folder, "cache"))
            start, wall = seconds[workers], seconds[options.images]
            rate = (options.images - workers) / (wall - start)
            rows.append(
                {
                    "runner": runner,
                    "workers": workers,
                    "start_s": round(start, 1),
                    "wall_s": round(wall, 1),
                    "rate": round(rate, 2),
                }
            )
            against = rows[-1]["rate"] / rows[0]["rate"]
            told = f"{rate:6.2f} images per second, {against:.2f} times here"
            print(f"{runner:10} {workers} workers: {told}; {start:.1f} s to start", flush=True)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "images": options.images, "rows": rows}))


def _run(stage: str, project: Path, environment: dict[str, str]) -> float:
    """A stage's seconds."""
    name, *arguments = stage.split(" ")
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", f"flows.stages.{name}", *arguments], cwd=project, env=environment, check=True
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
