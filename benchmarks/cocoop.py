"""Peak memory of one training step of CoCoOp against CoOp's, each in a process of its own.

A step is a batch of 32 images of ten classes through the text tower of ViT-B-32, with random weights:
memory does not care. CoCoOp goes there in chunks of images; "whole batch" is what it would take without
them.

    python -m benchmarks.cocoop
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

CHUNK = 2  # images, as params.yaml has it
BATCH = 32
CLASSES = 10
MOST = 4.0  # times CoOp's memory that CoCoOp may take
STEPS = ("coop", "cocoop", "whole batch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # what a child process measures
    arguments = parser.parse_args()
    if arguments.step:
        print(_peak(arguments.step, arguments.model))
        return
    peaks = {step: _in_a_process(step, arguments.model) for step in STEPS}  # MiB
    ratio, whole = (peaks[step] / peaks["coop"] for step in STEPS[1:])
    for step, peak in peaks.items():
        print(f"{step:12} {peak:8.1f} MiB  {peak / peaks['coop']:6.2f} times CoOp")
    result = {"mib": peaks, "ratio": round(ratio, 2), "ratio_whole_batch": round(whole, 2), "most": MOST}
    if arguments.json:
        print(json.dumps(result))
    if ratio > MOST:
        raise SystemExit(f"CoCoOp's step takes {ratio:.2f} times CoOp's memory; more than {MOST}.")


def _in_a_process(step: str, model: str) -> float:
    """MiB that one training step adds to what the process had before it.

    The allocator is told to give freed memory back at once, for the step would otherwise live on what the
    model's construction left behind, unseen.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.cocoop", "--step", step, "--model", model]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _peak(step: str, model: str) -> float:
    # Imported here, for a child inherits the peak of the process that starts it.
    import torch

    from medfocus.clip.build import build_clip
    from medfocus.learning.method import Support
    from medfocus.methods.cocoop import CoCoOp
    from medfocus.methods.coop import CoOp

    torch.set_num_threads(1)
    clip = build_clip(model, "random:0")
    shared = {
        "contexts": 4, "start": "", "epochs": 1, "max_steps": 1, "batch_size": BATCH, "lr": 2e-3, "warmup": 0,
        "weight_decay": 5e-4,
    }  # fmt: skip
    if step == "coop":
        method = CoOp(clip, class_token="end", class_specific=False, **shared)
    else:
        method = CoCoOp(clip, reduction=16, chunk=CHUNK if step == "cocoop" else BATCH, **shared)

    def fit(images: int, classes: int) -> None:
        support = Support(
            inputs=torch.nn.functional.normalize(torch.randn(1, images, clip.dim), dim=-1),
            labels=torch.arange(images) % classes,
            groups=torch.arange(images),
            text_features=torch.zeros(classes, clip.dim),
            class_names=tuple(f"class {number}" for number in range(classes)),
        )
        method.fit(support, torch.Generator().manual_seed(0))

    fit(2, 2)  # what is loaded and planned at the first step only
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is held now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit(BATCH, CLASSES)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # KiB -> MiB


if __name__ == "__main__":
    main()
