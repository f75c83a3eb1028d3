"""The honesty rows: logistic regression and an RBF-SVM on a tiny grey image, without any network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from medfocus.learning.method import Support
from medfocus.learning.probe import Probe, fit_probe
from medfocus.learning.selection import choose

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

COST_WITHOUT_VALIDATION, GAMMA_WITHOUT_VALIDATION = 10.0, 1.0  # where a class is too small to hold one out


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Images (B, S, S, C) uint8, RGB first -> grey thumbnails (B, side * side) in [0, 1]."""
    grey = images[..., :3].float().mean(dim=3)[:, None] / 255  # (B, 1, S, S)
    return functional.interpolate(grey, (side, side), mode="bilinear", antialias=True).flatten(1)


@dataclass(frozen=True)
class Standardisation:
    """Mean and deviation of every pixel of a support."""

    mean: np.ndarray  # (P,)
    scale: np.ndarray  # (P,)

    @classmethod
    def of(cls, pixels: np.ndarray) -> Self:
        """That of thumbnails (N, P); a constant pixel carries nothing."""
        return cls(pixels.mean(axis=0), np.maximum(pixels.std(axis=0), 1e-3))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, P) -> (N, P) of norm one on average, as the grids of C and γ expect."""
        return (pixels - self.mean) / self.scale / len(self.mean) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Its numbers, by names that a checkpoint keeps."""
        return {"mean": torch.from_numpy(self.mean), "scale": torch.from_numpy(self.scale)}

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Self:
        """The one of which ``state`` was taken; other names in it are passed over."""
        return cls(state["mean"].numpy(), state["scale"].numpy())


@dataclass
class Pixels:
    """Standardised grey pixels -> logistic regression. A method that does not beat it has learnt nothing."""

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    side: int  # pixels a side of the grey thumbnail
    folds: int  # of the cross-validation that chooses C
    probe_: Probe = field(init=False, repr=False)
    standardise_: Standardisation = field(init=False, repr=False)

    @property
    def embedding(self) -> str:
        """Independent of the encoder but for the views that it asks for."""
        return f"pixels-{self.side}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> grey thumbnails (B, side * side) in [0, 1]."""
        return thumbnails(images, self.side)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Standardise by the support's own mean and deviation, then fit the probe."""
        pixels = support.inputs[0].double().numpy()
        self.standardise_ = Standardisation.of(pixels)
        self.probe_ = fit_probe(
            self.standardise_(pixels),
            support.labels.numpy(),
            support.groups.numpy(),
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, side * side) -> logits (N, K)."""
        return {"probe": torch.from_numpy(self.probe_.logits(self.standardise_(inputs.double().numpy())))}

    def state(self) -> dict[str, Tensor]:
        """Probe and standardisation."""
        return self.probe_.state() | self.standardise_.state()

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.probe_ = Probe.load(state)
        self.standardise_ = Standardisation.load(state)
        return self


@dataclass(frozen=True)
class RbfMachine:
    """A fitted RBF-SVM as arrays: what scikit-learn's ``SVC`` computes, without its object."""

    vectors: np.ndarray  # (M, P) support vectors, ordered by class
    counts: np.ndarray  # (K,) int64, how many of them each class has
    dual_coef: np.ndarray  # (K - 1, M) a vector's weights against the other classes, in their order
    intercept: np.ndarray  # (K (K - 1) / 2,) for the pairs (0, 1), (0, 2), ... (1, 2), ...
    gamma: float  # of exp(-γ |x - x'|²)

    @classmethod
    def fit(
        cls, pixels: np.ndarray, labels: np.ndarray, cost: float, gamma: float
    ) -> tuple[Self, np.ndarray]:
        """The machine for (N, P), (N,) labels covering 0..K-1, and which images its vectors are (M,)."""
        model = SVC(C=cost, gamma=gamma, kernel="rbf")  # pyright: ignore[reportArgumentType]
        model.fit(pixels, labels)
        machine = cls(
            pixels[model.support_],
            np.asarray(model.n_support_, dtype=np.int64),
            np.asarray(model.dual_coef_, dtype=np.float64),
            np.asarray(model.intercept_, dtype=np.float64),
            gamma,
        )
        return machine, np.asarray(model.support_)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """(N, P) -> (N, K): of two classes ∓d/2, of more scikit-learn's ``decision_function_shape="ovr"``.

        That is the number of pairs that a class wins plus c / (3 (|c| + 1)), c the sum of the margins for
        it: less than half a vote, so it orders classes of equal votes.
        """
        kernel = np.exp(-self.gamma * cdist(pixels, self.vectors, "sqeuclidean"))  # (N, M)
        classes = len(self.counts)
        if classes == 2:
            margin = kernel @ self.dual_coef[0] + self.intercept[0]  # (N,), positive for class 1
            return np.stack([-margin, margin], axis=1) / 2
        ends = np.cumsum(self.counts)
        of = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        votes, confidence = np.zeros((len(pixels), classes)), np.zeros((len(pixels), classes))
        pairs = ((i, j) for i in range(classes) for j in range(i + 1, classes))
        for place, (i, j) in enumerate(pairs):
            margin = kernel[:, of[i]] @ self.dual_coef[j - 1, of[i]]
            margin += kernel[:, of[j]] @ self.dual_coef[i, of[j]] + self.intercept[place]  # positive for i
            votes[:, i] += margin >= 0
            votes[:, j] += margin < 0
            confidence[:, i] += margin
            confidence[:, j] -= margin
        return votes + confidence / (3 * (np.abs(confidence) + 1))


@dataclass
class PixelsSvm:
    """Standardised grey pixels -> RBF-SVM, C and γ chosen by cross-validation inside the support.

    The softmax of ``RbfMachine.logits`` stands for probabilities in that choice as in every score.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = False
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder
    side: int  # pixels a side of the grey thumbnail
    costs: tuple[float, ...]  # candidates for C
    gammas: tuple[float, ...]  # candidates for γ; 1 is scikit-learn's "scale"
    folds: int  # of the cross-validation that chooses them
    cost_: float = field(init=False)
    machine_: RbfMachine = field(init=False, repr=False)
    vectors_: Tensor = field(init=False, repr=False)  # (M, side * side) thumbnails of the support vectors
    standardise_: Standardisation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("costs", self.costs), ("gammas", self.gammas)):
            if not values or min(values) <= 0:
                raise ValueError(f"pixels-svm: {name} is {list(values)}; give one or more values above 0.")

    @property
    def embedding(self) -> str:
        """Independent of the encoder but for the views that it asks for."""
        return f"pixels-{self.side}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, 3) uint8 -> grey thumbnails (B, side * side) in [0, 1]."""
        return thumbnails(images, self.side)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose C and γ, then fit on the whole support."""
        pairs = list(product(self.costs, self.gammas))

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            pixels = fit.inputs[0].double().numpy()
            standardise = Standardisation.of(pixels)
            for cost, gamma in pairs:
                machine, _ = RbfMachine.fit(standardise(pixels), fit.labels.numpy(), cost, gamma)
                yield torch.from_numpy(machine.logits(standardise(held.inputs[0].double().numpy())))

        self.cost_, gamma = choose(
            pairs,
            support,
            held_out_logits,
            folds=self.folds,
            seed=generator.initial_seed() % 2**32,
            otherwise=(COST_WITHOUT_VALIDATION, GAMMA_WITHOUT_VALIDATION),
        )
        pixels = support.inputs[0].double().numpy()
        self.standardise_ = Standardisation.of(pixels)
        labels = support.labels.numpy()
        self.machine_, index = RbfMachine.fit(self.standardise_(pixels), labels, self.cost_, gamma)
        self.vectors_ = support.inputs[0, torch.from_numpy(index).long()]
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, side * side) -> logits (N, K)."""
        return {"svm": torch.from_numpy(self.machine_.logits(self.standardise_(inputs.double().numpy())))}

    def state(self) -> dict[str, Tensor]:
        """Thumbnails of the support vectors, their weights, the chosen C and γ, and the standardisation."""
        return {
            "vectors": self.vectors_,
            "counts": torch.from_numpy(self.machine_.counts),
            "dual_coef": torch.from_numpy(self.machine_.dual_coef),
            "intercept": torch.from_numpy(self.machine_.intercept),
            "gamma": torch.tensor(self.machine_.gamma, dtype=torch.float64),
            "C": torch.tensor(self.cost_, dtype=torch.float64),
            **self.standardise_.state(),
        }

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.standardise_ = Standardisation.load(state)
        self.vectors_, self.cost_ = state["vectors"], float(state["C"])
        self.machine_ = RbfMachine(
            self.standardise_(self.vectors_.double().numpy()),
            state["counts"].numpy(),
            state["dual_coef"].numpy(),
            state["intercept"].numpy(),
            float(state["gamma"]),
        )
        return self
