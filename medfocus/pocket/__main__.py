"""Train the pocket models from a seed and measure them: ``python -m medfocus.pocket --out FOLDER``.

On CPUs both train at once, each in a process with a share of the cores; on a GPU they train one after
another. An interrupted training resumes. The command writes the weights, their cards and all figures
(``pocket.json``) to the folder, and compares the figures with the packaged figures. To ship the models, copy
these files to medfocus/data/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from medfocus.pocket import clip, measure, sam2
from medfocus.pocket.pool import RECIPES, Pool, draw_pool
from medfocus.storage import atomic

STEPS = {"sam2": 6300, "clip": 2050}
PER_CLASS = 40  # held-out images to measure
PACKAGED = Path(__file__).parents[1] / "data"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, train, measure and compare; exit with 1 if a figure differs by more than the tolerance."""
    parser = argparse.ArgumentParser(
        prog="python -m medfocus.pocket", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, cards and figures")
    parser.add_argument(
        "--cache", type=Path, help="folder for the training images, 3.3 GB (default: OUT/pool)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images", type=int, help="training images per model (default: as for the packaged models)"
    )
    parser.add_argument("--sam2-steps", type=int, default=STEPS["sam2"])
    parser.add_argument("--clip-steps", type=int, default=STEPS["clip"])
    parser.add_argument(
        "--per-class", type=int, default=PER_CLASS, help="held-out images to measure per class"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="also write a contact sheet of unprompted masks"
    )
    options = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    files = {name: options.out / f"{name}_pocket.safetensors" for name in STEPS}
    steps = {"sam2": options.sam2_steps, "clip": options.clip_steps}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        pools = {
            name: draw_pool(
                options.cache or options.out / "pool",
                name,
                options.seed,
                options.images or RECIPES[name].count,
                cores,
            )
            for name in missing
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        at_once = 1 if device == "cuda" else len(missing)
        tasks = [
            (name, pools[name], options.seed, files[name], steps[name], max(1, cores // at_once), device)
            for name in missing
        ]
        with multiprocessing.get_context("spawn").Pool(at_once) as workers:
            workers.starmap(_train, tasks, chunksize=1)

    figures = {
        "sam2_pocket": measure.measure_masks(files["sam2"], options.per_class),
        "clip_pocket": measure.measure_zero_shot(files["clip"], files["sam2"], options.per_class),
    }
    for name, rows in figures.items():
        text = measure.card(name, options.out / f"{name}.safetensors", rows, options.per_class)
        atomic.write(options.out / f"{name}.md", text)
        print(text)
    text = json.dumps({"per_class": options.per_class, **figures}, indent=1) + "\n"
    atomic.write(options.out / "pocket.json", text)
    if options.sheet:
        atomic.write(options.sheet, measure.sheet(files["sam2"], per_modality=12, columns=6))

    packaged = json.loads((PACKAGED / "pocket.json").read_text())
    differences = [line for name in figures for line in measure.differences(figures[name], packaged[name])]
    print("\n".join(differences) or f"Every figure is within {measure.TOLERANCE} of the packaged figure.")
    if differences:
        raise SystemExit(1)


def _train(name: str, pool: Pool, seed: int, out: Path, steps: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    train = {"sam2": sam2.train, "clip": clip.train}[name]
    workers = 0 if device == "cpu" else 4
    line = list(STEPS).index(name)
    train(pool, seed, out, steps=steps, workers=workers, device=device, line=line)


if __name__ == "__main__":
    # Worker processes import ``_train`` by its module's name, which must not be __main__.
    from medfocus.pocket.__main__ import main as run

    run()
