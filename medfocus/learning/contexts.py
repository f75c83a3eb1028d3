"""The base of methods that learn the context vectors of prompts by SGD through the frozen text tower."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from medfocus.clip.prompt_learning import find_placeholder
from medfocus.learning.frozen import FeatureMethod
from medfocus.learning.training import Schedule

WARMUP_LR = 1e-5  # the published value, which does not depend on the learning rate
SHOTS = (0, 2, 8)  # images per class from which the first, the second and the third number of epochs holds


@dataclass(kw_only=True)
class SgdSchedule(Schedule):
    """Hyperparameters of ``train_sgd``."""

    max_steps: int | None  # upper bound on optimisation steps; all epochs of ``learning_rate`` pass in them
    warmup: int  # epochs at 1e-5


@dataclass
class ContextMethod(FeatureMethod):
    """A method whose prompts have learned contexts."""

    takes_views: ClassVar[bool] = True
    name: ClassVar[str]  # for messages
    contexts: int  # M
    start: str  # text of M tokens that initialises the contexts; empty: N(0, 0.02)
    epochs: int | tuple[int, ...]  # passes over the support; if three, ``epochs_for`` chooses by the shots
    max_steps: int | None  # upper bound on optimisation steps; None: the epochs run in full
    batch_size: int
    lr: float  # learning rate at the start of the cosine
    warmup: int  # epochs at 1e-5
    weight_decay: float

    def check(self, *more: str) -> None:
        """Raise ValueError for a hyperparameter out of range; ``more`` names further ones of at least 1."""
        if not isinstance(self.epochs, int) and len(self.epochs) != len(SHOTS):
            raise ValueError(
                f"{self.name}: epochs is {list(self.epochs)}. Give one number, or three: for 1 shot, for 2 "
                "to 7 shots, and for 8 shots or more."
            )
        epochs = (self.epochs,) if isinstance(self.epochs, int) else self.epochs
        for name in ("contexts", "max_steps", "batch_size", *more):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{self.name}: {name} is {count}. Use 1 or more.")
        if min(epochs) < 1:
            raise ValueError(f"{self.name}: epochs is {min(epochs)}. Use 1 or more.")
        if not 0 <= self.warmup < min(epochs):
            raise ValueError(
                f"{self.name}: warmup is {self.warmup} epochs of {min(epochs)}. "
                "Use 0 or more, and fewer than epochs."
            )

    @property
    def needs_towers(self) -> bool:
        """See ``Method.needs_towers``."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``Method.needs``."""
        return ("contexts",)

    def check_towers(self, caller: str) -> None:
        """See ``Method.check_towers``; the tokenizer counts too."""
        super().check_towers(caller)
        find_placeholder(caller, self.encoder)

    def schedule_for(self, images: int, classes: int) -> SgdSchedule:
        """Return the schedule for a support of ``images`` images in ``classes`` classes."""
        return SgdSchedule(
            epochs=self.epochs if isinstance(self.epochs, int) else epochs_for(images / classes, self.epochs),
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
        )


def epochs_for(shots: float, epochs: Sequence[int]) -> int:
    """Return the epochs for the mean number of images per class: for fewer than 2, fewer than 8, or more.

    CoOp's public code has 50 epochs for 1 shot, 100 for 2 and 4, and 200 for 8 and 16.
    """
    return epochs[bisect_right(SHOTS, shots) - 1]


def train_sgd(
    parameters: Iterable[nn.Parameter],
    accumulate: Callable[[Tensor, Tensor], None],
    count: int,
    schedule: SgdSchedule,
    *,
    views: int,
    generator: torch.Generator,
) -> None:
    """Train by SGD with momentum 0.9, as CoOp and CoCoOp do, and keep the last iterate.

    Args:
        parameters: The parameters to train.
        accumulate: Adds the gradient of a batch to the parameters; takes image and view indices (B,), (B,).
        count: N, images in the support.
        schedule: Epochs, steps, batch size, learning rate, warm-up and weight decay.
        views: Number of cached views of each image; each step draws one of them.
        generator: Draws the batches and the views.
    """
    lr, epochs, size = schedule.lr, schedule.epochs, schedule.batch_size
    optimizer = torch.optim.SGD(list(parameters), lr=lr, momentum=0.9, weight_decay=schedule.weight_decay)
    steps = epochs * math.ceil(count / size)
    if schedule.max_steps is not None:
        steps = min(steps, schedule.max_steps)
    step = 0
    while step < steps:
        for index in torch.randperm(count, generator=generator).split(size)[: steps - step]:
            view = torch.randint(views, (len(index),), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step * epochs // steps, epochs=epochs, lr=lr, warmup=schedule.warmup
                )
            optimizer.zero_grad(set_to_none=True)
            accumulate(index, view)
            optimizer.step()
            step += 1


def learning_rate(epoch: int, *, epochs: int, lr: float, warmup: int) -> float:
    """Return the published learning rate: 1e-5 for ``warmup`` epochs, then a cosine that starts at ``lr``.

    As in the public code, the cosine has a length of ``epochs`` and starts after the warm-up, so it does not
    reach its end.
    """
    if epoch < warmup:
        return WARMUP_LR
    return lr / 2 * (1 + math.cos(math.pi * (epoch - warmup) / epochs))
