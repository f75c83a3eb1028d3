"""The one optimisation loop, shared by every method that learns by gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    *,
    views: int,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
    max_steps: int | None = None,
) -> list[float]:
    """Minimise ``loss`` by AdamW with a cosine schedule and keep the last iterate.

    The loop knows no validation and no test data: there is nothing by which it could pick
    a lucky epoch.

    Args:
        parameters: What trains.
        loss: Maps image indices (B,) and the view drawn for each (B,) to a scalar.
        labels: (N,) labels of the support; only their number is used.
        views: How many cached views each image has; one is drawn per image and step.
        epochs: Passes over the support.
        batch_size: Images a step; the last batch of an epoch may be smaller.
        lr: Learning rate at the start of the cosine.
        weight_decay: AdamW's decoupled weight decay.
        generator: The source of batch order and view draws.
        max_steps: A bound on the optimisation steps: no epoch but the first goes beyond it.

    Returns:
        The mean loss of every epoch.
    """
    count = len(labels)
    per_epoch = math.ceil(count / batch_size)
    if max_steps is not None:
        epochs = max(1, min(epochs, max_steps // per_epoch))
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * per_epoch)
    history = []
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(count, generator=generator).split(batch_size):
            view = torch.randint(views, (len(index),), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            value = loss(index, view)
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach()) * len(index)
        history.append(total / count)
    return history
