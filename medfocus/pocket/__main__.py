"""Train the pocket models from a seed and measure them: ``python -m medfocus.pocket --out FOLDER``.

SAM2 trains on phantoms and, with ``--pairs FOLDER`` or POCKET_DATA=FOLDER, on the pairs of that folder. CLIP
trains on phantoms. On CPUs both train at once, each in a process with a share of the cores; on a GPU they
train one after another. An interrupted training resumes. The command writes the weights, their cards and all
figures (``pocket.json``) to the folder, and compares the figures with the packaged figures. To ship the
models, copy these files to medfocus/data/.
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
from medfocus.pocket.pairs import Pairs
from medfocus.pocket.pool import RECIPES, Pool, draw_pool
from medfocus.storage import atomic

STEPS = {"sam2": 3600, "clip": 2000}
CORRECTING = 0.5  # steps of SAM2's second round, as a share of the first
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
    parser.add_argument(
        "--pairs",
        type=Path,
        default=os.environ.get("POCKET_DATA") or None,
        metavar="FOLDER",
        help="folder of pairs of an image and a mask (default: POCKET_DATA; without it, phantoms alone)",
    )
    parser.add_argument(
        "--research",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train on the sources without a licence of their own, whose terms ask for a citation",
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
    pairs = held_out = None
    if options.pairs is not None:
        pairs, held_out = Pairs(options.pairs, research=options.research), Pairs(options.pairs, held_out=True)
        _ = pairs.rows  # a missing table is reported before any work
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
        threads = max(1, cores // at_once)
        tasks = [
            (name, pools[name], pairs, options.seed, files[name], steps[name], threads, device)
            for name in missing
        ]
        with multiprocessing.get_context("spawn").Pool(at_once) as workers:
            workers.starmap(_train, tasks, chunksize=1)

    figures = {
        "sam2_pocket": measure.measure_masks(files["sam2"], options.per_class),
        "clip_pocket": measure.measure_zero_shot(files["clip"], files["sam2"], options.per_class),
    }
    real = measure.measure_pairs(files["sam2"], held_out) if held_out else {}
    for name, rows in figures.items():
        of_pairs = real if name == "sam2_pocket" else None
        text = measure.card(name, options.out / f"{name}.safetensors", rows, options.per_class, of_pairs)
        atomic.write(options.out / f"{name}.md", text)
        print(text)
    text = json.dumps({"per_class": options.per_class, **figures, "sam2_pairs": real}, indent=1) + "\n"
    atomic.write(options.out / "pocket.json", text)
    if options.sheet:
        atomic.write(options.sheet, measure.sheet(files["sam2"], per_modality=12, columns=6))

    packaged = json.loads((PACKAGED / "pocket.json").read_text())
    differences = []
    for name, found in figures.items():
        folders = (options.out, PACKAGED)
        data, usual = (measure.trained_on(folder / f"{name}.safetensors") for folder in folders)
        if data != usual:
            print(f"{name}: not compared, because it was trained on {data}, and the packaged on {usual}.")
            continue
        differences += measure.differences(found, packaged[name])
        if name == "sam2_pocket":
            differences += measure.differences(real, packaged["sam2_pairs"])
    print(
        "\n".join(differences) or f"Every compared figure is within {measure.TOLERANCE} of the packaged one."
    )
    if differences:
        raise SystemExit(1)


def _train(
    name: str,
    pool: Pool,
    pairs: Pairs | None,
    seed: int,
    out: Path,
    steps: int,
    threads: int,
    device: str,
) -> None:
    torch.set_num_threads(threads)
    workers, line = 0 if device == "cpu" else 4, list(STEPS).index(name)
    if name == "sam2":
        first = out.with_name(f"first_{out.name}")
        rounds = ((first, None, steps), (out, first, round(CORRECTING * steps)))
        for file, start, count in rounds:
            if not file.is_file():
                sam2.train(
                    pool,
                    seed,
                    file,
                    pairs=pairs,
                    steps=count,
                    workers=workers,
                    device=device,
                    line=line,
                    first=start,
                )
    else:
        clip.train(pool, seed, out, steps=steps, workers=workers, device=device, line=line)


if __name__ == "__main__":
    # Worker processes import ``_train`` by its module's name, which must not be __main__.
    from medfocus.pocket.__main__ import main as run

    run()
