"""Memory, and the time of a rerun without changes, as the archive grows.

Draws a small and a ten times larger archive of small images, and runs the stages of a study on each, every
stage in its own process:

    ingest, duplicates      files -> manifest -> pairs of twins
    masks, features         computed into an empty cache
    masks again, features again    with a full cache
    dvc repro again         the whole study without changes (the large archive only)

The output shows CPU time next to the seconds, because other work on the machine affects it less. The peak is
that of the stage's process, including libraries and models. It includes everything that grows with N: the
manifest, the index of the caches and the features, which `features.encode` returns as one tensor.

    python -m benchmarks.archive
    python -m benchmarks.archive --segmenter sam2 --large 1000 --no-repro
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.clone import ROOT, clone

if TYPE_CHECKING:
    from medfocus.masks.segmenter import Segmenter

STEPS = ("ingest", "duplicates", "masks", "masks again", "features", "features again")
MOST_PEAK = 1.1  # times the small archive's peak
MOST_SECONDS = 5.0  # of a step without work
CLASSES = ("dark", "light")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", type=int, help="images; default: a tenth of --large")
    parser.add_argument("--large", type=int, default=10_000, help="images")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--segmenter", choices=("otsu", "sam2"), default="otsu", help="sam2: pocket weights")
    parser.add_argument("--repro", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # the step of a child process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        began = time.perf_counter()
        done = measured(options.step, options.folder, options.segmenter)
        print(json.dumps({**done, "process_s": round(time.perf_counter() - began, 2), "peak_mib": _peak()}))
        return

    small = options.small or options.large // 10
    result: dict[str, Any] = {"small": small, "large": options.large, "segmenter": options.segmenter}
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[int, dict[str, Any]] = {}
        for count in (small, options.large):
            draw(Path(folder, str(count), "images"), count, options.size)
            rows[count] = {step: _in_a_process(step, Path(folder, str(count)), options) for step in STEPS}
            for step, row in rows[count].items():
                times = f"{row['seconds']:8.2f} s {row['cpu_s']:8.2f} s CPU"
                print(f"{count:7} {step:15} {times} {row['peak_mib']:8.1f} MiB", flush=True)
        for step in ("masks", "features"):
            result[f"peak_ratio_{step}"] = round(_ratio(rows[options.large][step], rows[small][step]), 3)
            result[f"noop_{step}_s"] = rows[options.large][f"{step} again"]["seconds"]
        if options.repro:
            result |= repro(Path(folder, "project"), Path(folder, str(options.large), "images"))
    result["steps"] = rows
    for name, value in result.items():
        most = MOST_PEAK if name.startswith("peak") else MOST_SECONDS
        if name.startswith(("peak", "noop")):
            verdict = "reached" if value <= most else f"FALLS SHORT by {value - most:.2f}"
            print(f"{name:20} {value:8.3f}, at most {most}: {verdict}")
    if options.json:
        print(json.dumps(result))


def draw(folder: Path, count: int, size: int) -> None:
    """Write ``count`` different grey images as folder/train|test/class/number.png, 20 % in test."""
    import numpy as np
    from PIL import Image

    for split in ("train", "test"):
        for label in CLASSES:
            Path(folder, split, label).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 200, (8, 8), dtype=np.uint8))
        image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) // 2
        image = image + rng.integers(0, 40, (size, size), dtype=np.uint8) + 80 * (i % 2)
        path = Path(folder, "test" if i % 10 < 2 else "train", CLASSES[i % 2], f"{i:06}.png")
        Image.fromarray(image.astype(np.uint8)).save(path, compress_level=1)


def measured(step: str, folder: Path, segmenter: str) -> dict[str, Any]:
    """Run one stage on the outputs of the previous stages; measure without imports and models."""
    # Imported here, so that a stage's peak contains only its own imports.
    from medfocus.datasets.records import read_manifest, write_manifest

    root, manifest = folder / "images", folder / "manifest.csv"
    if step == "ingest":
        from medfocus.datasets.ingest import ingest

        began = _clocks()
        write_manifest(ingest(root).records, manifest)
        return _since(began)
    if step == "duplicates":
        from medfocus.datasets.duplicates import find_duplicates

        began = _clocks()
        pairs = find_duplicates(read_manifest(manifest), root)
        return _since(began) | {"pairs": len(pairs)}
    if step.startswith("masks"):
        return _masks(folder, _segmenter(segmenter), again=step.endswith("again"))
    return _features(folder, again=step.endswith("again"))


def _segmenter(name: str) -> Segmenter:
    if name == "otsu":
        from medfocus.masks.otsu import OtsuSegmenter

        return OtsuSegmenter()
    import torch

    from medfocus.masks.sam2.segmenter import load_sam2
    from medfocus.masks.settings import Sam2Settings

    torch.set_num_threads(1)
    return load_sam2(Sam2Settings("pocket", "pocket", None, "interest"), batch_size=16)


def _masks(folder: Path, segmenter: Segmenter, again: bool) -> dict[str, Any]:
    from medfocus.datasets.records import read_manifest
    from medfocus.masks.published import publish
    from medfocus.masks.store import MaskStore, cache_masks

    began = _clocks()
    records = read_manifest(folder / "manifest.csv")
    store = MaskStore(folder / "cache" / "masks")
    images = ((record, folder / "images" / record.path) for record in records)
    done = cache_masks(images, segmenter, store, batch_size=16)
    cached = time.perf_counter()
    publish(records, store, segmenter.key, folder / "masks")
    assert (done.computed == 0) == again, done
    return _since(began) | {"publish_s": round(time.perf_counter() - cached, 2)}


def _features(folder: Path, again: bool) -> dict[str, Any]:
    import torch

    from medfocus.clip import features
    from medfocus.clip.build import build_clip
    from medfocus.datasets.records import read_manifest
    from medfocus.focus.view import view
    from medfocus.images import decode
    from medfocus.masks.published import PublishedMasks

    torch.set_num_threads(1)
    clip = build_clip("pocket", "random:0")
    encoded = 0

    def encode(views: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(views)
        return clip.encode_images(clip.preprocess(views))

    began = _clocks()
    records = read_manifest(folder / "manifest.csv")
    masks = PublishedMasks(folder / "masks")
    result = features.encode(
        records,
        [record.sha256 for record in records],
        lambda record: view(
            decode.read(folder / "images" / record.path), masks[record.sha256],
            focus="multiply", frame=clip.frame, feather=0.01,
        ),
        encode,
        cache=folder / "cache" / "features",
        settings=clip.key,
        batch_size=64,
    )  # fmt: skip
    assert (encoded == 0) == again, encoded
    return _since(began) | {"result_mib": round(result.nbytes / 2**20, 1)}


def repro(project: Path, images: Path) -> dict[str, float]:
    """Run a small study of ``images`` in a clone of this project, then measure a run without changes."""
    import yaml

    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["study"] |= {"methods": {"pixels": ["none"]}, "percents": [5], "seeds": [0]}
    described = next(iter(content["datasets"].values()))
    content["datasets"] = {"archive": {**described, "root": str(images), "modality": "other"}}
    content["phantoms"] = {}
    content["masks"] |= {"segmenter": "otsu", "keep": {}}
    content["validation"] |= {"methods": ["pixels"]}
    content["report"] |= {"baseline": "pixels"}
    environment = clone(project, content)
    dvc = [sys.executable, "-m", "dvc"]

    def seconds(*command: str) -> tuple[float, float, str]:
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr[-3000:]}")
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return round(time.perf_counter() - began, 2), round(cpu, 2), done.stdout

    first, _, _ = seconds(*dvc, "repro")
    again, again_cpu, text = seconds(*dvc, "repro")
    assert "Running stage" not in text, text
    flow, flow_cpu, text = seconds(sys.executable, "-c", _AS_THE_FLOW)
    print(f"dvc repro {first:.1f} s, again {again:.1f} s ({again_cpu:.1f} s CPU)")
    in_dvc = round(float(text.split()[-1]), 2)
    print(f"the flow's stages again {flow:.1f} s ({flow_cpu:.1f} s CPU), {in_dvc:.1f} s of them in DVC")
    return {
        "first_repro_s": first,
        "noop_repro_s": again,
        "repro_cpu_s": again_cpu,
        "noop_flow_stages_s": in_dvc,
        "flow_process_s": flow,
    }


_AS_THE_FLOW = """
import time
from pathlib import Path
from flows.stages.dvc import reproduce
from flows.study.study import open_study
study = open_study(Path("params.yaml"))
began = time.perf_counter()
assert not any([reproduce(study.folder, stage) for stage in study.stages])
print(time.perf_counter() - began)
"""


def _in_a_process(step: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.archive", "--step", step, "--folder", str(folder)]
    command += ["--segmenter", options.segmenter]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"wall_s": round(time.perf_counter() - began, 2)}


def _peak() -> float:
    """Return the peak in MiB. A child would inherit getrusage's peak from its parent."""
    status = Path("/proc/self/status").read_text()  # Linux
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> dict[str, float]:
    seconds, cpu = (now - then for now, then in zip(_clocks(), began, strict=True))
    return {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2)}


def _ratio(large: dict[str, Any], small: dict[str, Any]) -> float:
    return large["peak_mib"] / small["peak_mib"]


if __name__ == "__main__":
    main()
