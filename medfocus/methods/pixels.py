"""Baselines without any network: logistic regression and an RBF-SVM on a grey thumbnail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Self

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional

from medfocus.learning.folds import seed_of
from medfocus.learning.method import Method, Support
from medfocus.learning.probe import Probe, fit_probe
from medfocus.learning.selection import choose

# Used if a class is too small for cross-validation. One image per class says little about the class of other
# pixels, so a C as large as for CLIP's features would make the probabilities far too extreme.
C_WITHOUT_VALIDATION = 0.316
COST_WITHOUT_VALIDATION, GAMMA_WITHOUT_VALIDATION = 10.0, 1.0


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Images (B, S, S, C) uint8, RGB first -> grey thumbnails (B, side * side) in [0, 1]."""
    grey = images[..., :3].float().mean(dim=3)[:, None] / 255  # (B, 1, S, S)
    return functional.interpolate(grey, (side, side), mode="bilinear", antialias=True).flatten(1)


@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of every pixel of a support."""

    mean: np.ndarray  # (P,)
    scale: np.ndarray  # (P,)

    @classmethod
    def of(cls, pixels: np.ndarray) -> Self:
        """Return the standardisation of thumbnails (N, P); it maps a constant pixel to 0."""
        return cls(pixels.mean(axis=0), np.maximum(pixels.std(axis=0), 1e-3))

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Standardise thumbnails (N, P) to a mean norm of one, which the grids of C and γ assume."""
        return (pixels - self.mean) / self.scale / len(self.mean) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Return the arrays as tensors, by their names in a checkpoint."""
        return {"mean": torch.from_numpy(self.mean), "scale": torch.from_numpy(self.scale)}

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the standardisation with the tensors in ``state``; other names are ignored."""
        return cls(state["mean"].numpy(), state["scale"].numpy())


@dataclass
class ThumbnailMethod(Method):
    """A method on grey thumbnails."""

    side: int  # pixels a side of the thumbnail

    @property
    def embedding(self) -> str:
        """Thumbnails of this size; the encoder sets only the size of the views."""
        return f"pixels-{self.side}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8, RGB first -> grey thumbnails (B, side * side) in [0, 1]."""
        return thumbnails(images, self.side)


@dataclass
class Pixels(ThumbnailMethod):
    """Logistic regression on standardised grey pixels: a baseline for every method with a network."""

    folds: int  # of the cross-validation that chooses C
    probe_: Probe = field(init=False, repr=False)
    standardise_: Standardisation = field(init=False, repr=False)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Standardise by the support's mean and deviation, then fit the probe."""
        pixels = support.inputs[0].double().numpy()
        self.standardise_ = Standardisation.of(pixels)
        self.probe_ = fit_probe(
            self.standardise_(pixels),
            support.labels.numpy(),
            support.groups.numpy(),
            folds=self.folds,
            seed=seed_of(generator),
            without_validation=C_WITHOUT_VALIDATION,
        )
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, side * side) -> logits (N, K)."""
        return {"probe": torch.from_numpy(self.probe_.logits(self.standardise_(inputs.double().numpy())))}

    def state(self) -> dict[str, Tensor]:
        """Return the parameters of the probe and of the standardisation."""
        return self.probe_.state() | self.standardise_.state()

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.probe_ = Probe.load(state)
        self.standardise_ = Standardisation.load(state)
        return self


@dataclass(frozen=True)
class RbfMachine:
    """A fitted RBF-SVM as arrays; it computes the decision function of scikit-learn's ``SVC``."""

    vectors: np.ndarray  # (M, P) support vectors, ordered by class
    counts: np.ndarray  # (K,) int64, number of support vectors of each class
    dual_coef: np.ndarray  # (K - 1, M) weights of each vector against the other classes, in class order
    intercept: np.ndarray  # (K (K - 1) / 2,) of the class pairs (0, 1), (0, 2), ... (1, 2), ...
    gamma: float  # of exp(-γ |x - x'|²)

    @classmethod
    def fit(
        cls, pixels: np.ndarray, labels: np.ndarray, cost: float, gamma: float
    ) -> tuple[Self, np.ndarray]:
        """Fit pixels (N, P), labels (N,) covering 0..K-1; also return the support vectors' indices (M,)."""
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
        """Return the logits (N, K) of pixels (N, P), as scikit-learn's ``decision_function_shape="ovr"``.

        Two classes have the logits -d/2 and d/2 for the margin d. With more classes, a logit is the number of
        pairs that the class wins plus c / (3 (|c| + 1)), with c the sum of its margins. The second term is
        less than half a vote, so it only orders classes with equal votes.
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
class PixelsSvm(ThumbnailMethod):
    """RBF-SVM on standardised grey pixels; cross-validation inside the support chooses C and γ.

    Log-likelihood and scores use the softmax of ``RbfMachine.logits`` as probabilities.
    """

    costs: tuple[float, ...]  # candidates for C
    gammas: tuple[float, ...]  # candidates for γ; 1 is scikit-learn's "scale"
    folds: int  # of the cross-validation that chooses C and γ
    cost_: float = field(init=False)
    machine_: RbfMachine = field(init=False, repr=False)
    vectors_: Tensor = field(init=False, repr=False)  # (M, side * side) thumbnails of the support vectors
    standardise_: Standardisation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, values in (("costs", self.costs), ("gammas", self.gammas)):
            if not values or min(values) <= 0:
                raise ValueError(f"pixels-svm: {name} is {list(values)}; give one or more values above 0.")

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
            seed=seed_of(generator),
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
        """Return the support vectors with their weights, the chosen C and γ, and the standardisation."""
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
