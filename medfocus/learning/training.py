"""The optimisation loop of every method that trains by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]  # image indices (B,) and the view drawn for each (B,) -> scalar


@dataclass(kw_only=True)
class Schedule:
    """Hyperparameters of training; a method inherits them as its own."""

    epochs: int  # passes over the support
    batch_size: int  # images per step; the last batch of an epoch may be smaller
    lr: float  # the highest learning rate, at the start of the cosine
    weight_decay: float


def train(
    parameters: Iterable[nn.Parameter],
    loss: Loss,
    labels: Tensor,
    schedule: Schedule,
    *,
    views: int,
    generator: torch.Generator,
    max_steps: int | None = None,
    warmup: float = 0.0,
) -> list[float]:
    """Minimise ``loss`` by AdamW with a cosine schedule and keep the last iterate.

    The loop sees neither validation nor test data, so it cannot select an epoch by them.

    Args:
        parameters: The parameters to train.
        loss: Maps image indices (B,) and the view drawn for each (B,) to a scalar.
        labels: (N,) labels of the support; only their number is used.
        schedule: Epochs, batch size, learning rate and weight decay.
        views: Number of cached views of each image; each step draws one view per image.
        generator: The source of batch order and view draws.
        max_steps: Upper bound on optimisation steps; the first epoch always runs in full.
        warmup: Share of the steps in which the learning rate rises linearly, before the cosine.

    Returns:
        The mean loss of every epoch.
    """
    count = len(labels)
    epochs = passes(count, schedule, max_steps)
    steps = epochs * math.ceil(count / schedule.batch_size)
    rising = round(warmup * steps)
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    cycle = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history = []
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(count, generator=generator).split(schedule.batch_size):
            view = torch.randint(views, (len(index),), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            value = loss(index, view)
            value.backward()
            optimizer.step()
            cycle.step()
            total += float(value.detach()) * len(index)
        history.append(total / count)
    return history


def passes(images: int, schedule: Schedule, max_steps: int | None) -> int:
    """Return the number of epochs over ``images`` images that ``train`` runs."""
    if max_steps is None:
        return schedule.epochs
    return max(1, min(schedule.epochs, max_steps // math.ceil(images / schedule.batch_size)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
