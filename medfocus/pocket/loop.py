"""The resumable training loop of both pocket models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medfocus.storage import atomic

BatchT = TypeVar("BatchT")
_SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Settings:
    """The settings that determine a training, together with the code."""

    seed: int
    images: int  # of the pool of phantoms
    pairs: int  # real images with masks
    steps: int
    batch_size: int
    lr: float
    warmup: int  # steps
    weight_decay: float
    clip: float  # of the gradient's length


def train_and_write(
    title: str,
    out: Path,
    settings: Settings,
    data: str,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    batches: Dataset[BatchT],
    loss: Callable[[BatchT], tuple[Tensor, dict[str, float]]],
    finished: Callable[[], Mapping[str, Tensor]],
    *,
    workers: int,
    line: int = 0,
) -> None:
    """Train with AdamW, warm-up, a cosine to 0 and clipped gradients, and write the last step's weights.

    Args:
        title: Title of the progress bar.
        out: Safetensors file to write, with the settings as metadata. Every minute, the state of the training
            goes to ``out``.state, and a call with the same settings resumes from this file.
        settings: See ``Settings``.
        data: Description of the images, for the metadata.
        model: Model in training.
        trained: Parameters to train; weight decay leaves vectors out.
        batches: The batches by step; every process makes the same batches.
        loss: Returns a batch's loss, and values for the progress bar. The bar leaves NaN out.
        finished: Returns the tensors to write after training.
        workers: Processes that prepare batches; 0 for this process.
        line: Line of the progress bar, counted down from the cursor; several models may train at once.

    Raises:
        ValueError: The saved state has other settings.
    """
    state_file = out.with_name(out.name + ".state")
    groups = [
        {"params": [v for v in trained.values() if v.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [v for v in trained.values() if v.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    start, before = 0, 0.0
    if state_file.is_file():
        saved = torch.load(state_file, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise ValueError(
                f"{state_file} belongs to a training with {saved['settings']}, not {asdict(settings)}. "
                "Delete it, or train with its settings."
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, before = saved["step"], saved["seconds"]

    stream: Iterable[BatchT] = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, settings.steps),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    began = last_save = time.monotonic()
    running: dict[str, float] = {}
    with tqdm(
        total=settings.steps, initial=start, desc=title, unit="step", mininterval=5, position=line
    ) as bar:
        for step, batch in enumerate(stream, start):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(step, settings.steps, settings.warmup)
            total, watched = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
            optimizer.step()
            for name, value in watched.items():
                if not math.isnan(value):
                    running[name] = 0.98 * running.get(name, value) + 0.02 * value
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in running.items()}, refresh=False)
            if time.monotonic() - last_save > _SAVE_EVERY:
                last_save = time.monotonic()
                state = {
                    "settings": asdict(settings),
                    "step": step + 1,
                    "seconds": before + last_save - began,
                }
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                with atomic.new_file(state_file) as file:
                    torch.save(state, file)
    seconds = round(before + time.monotonic() - began)  # with those of interrupted runs
    halves = {name: value.detach().half().cpu().contiguous() for name, value in finished().items()}
    notes = asdict(settings) | {"seconds": seconds, "data": data}
    atomic.write(out, save(halves, {k: str(v) for k, v in notes.items()}))
    state_file.unlink(missing_ok=True)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: a linear rise over ``warmup`` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
