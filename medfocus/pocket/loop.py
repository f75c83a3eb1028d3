"""The resumable training loop of both pocket models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medfocus.pocket.pool import replace

BatchT = TypeVar("BatchT")
_SAVE_EVERY = 60.0  # seconds


def optimise(
    title: str,
    settings: Mapping[str, Any],
    state_file: Path,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    batches: Dataset[BatchT],
    loss: Callable[[BatchT], tuple[Tensor, dict[str, float]]],
    *,
    workers: int,
    line: int = 0,
) -> float:
    """AdamW with a warm-up, a cosine to 0 and clipped gradients; the last iterate stays in ``model``.

    Args:
        title: Beside the progress bar.
        settings: "steps", "lr", "warmup", "weight_decay", "clip", and whatever else the result depends on.
        state_file: Every minute everything goes there; with the same settings a new call goes on from it.
        model: Whose state is kept.
        trained: Its parameters that train; vectors among them do not decay.
        batches: Batch n, the same in every process.
        loss: A batch's loss and what to show of it; what is not a number is left out.
        workers: Processes that make batches ahead; 0 makes them here.
        line: Of the terminal, from the cursor down, for the progress bar: several may train at once.

    Returns:
        Seconds that training took, all its pieces together.

    Raises:
        ValueError: The state there is of other settings.
    """
    steps = settings["steps"]
    groups = [
        {"params": [v for v in trained.values() if v.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [v for v in trained.values() if v.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"])
    start, before = 0, 0.0
    if state_file.is_file():
        kept = torch.load(state_file, weights_only=True)
        if kept["settings"] != dict(settings):
            raise ValueError(
                f"{state_file}: is of a training with {kept['settings']}, not {dict(settings)}. "
                "Delete it, or train with its settings."
            )
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        start, before = kept["step"], kept["seconds"]

    stream: Iterable[BatchT] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    began = saved = time.monotonic()
    running: dict[str, float] = {}
    with tqdm(total=steps, initial=start, desc=title, unit="step", mininterval=5, position=line) as bar:
        for step, batch in enumerate(stream, start):
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * schedule(step, steps, settings["warmup"])
            total, watched = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), settings["clip"])
            optimizer.step()
            for name, value in watched.items():
                if not math.isnan(value):
                    running[name] = 0.98 * running.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
            if time.monotonic() - saved > _SAVE_EVERY:
                saved = time.monotonic()
                kept = {"settings": dict(settings), "step": step + 1, "seconds": before + saved - began}
                kept |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                replace(state_file, lambda file, kept=kept: torch.save(kept, file))
    return before + time.monotonic() - began


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: a linear rise over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def write_weights(out: Path, state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors as float16 safetensors with ``notes`` as metadata; all of the file or nothing appears."""
    halves = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    replace(out, lambda file: file.write_bytes(save(halves, {k: str(v) for k, v in notes.items()})))
