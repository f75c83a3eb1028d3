"""Train the singular values of CLIP's weight matrices: CLIP-SVD (Koleilat et al., arXiv 2509.03740).

In every block of both towers, each of the projections to q, k and v, the output of the attention, and both
layers of the MLP has a weight W = U diag(s) Vᵀ. The singular vectors U and V stay frozen, as do biases; only
s trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medfocus.clip.trained_towers import TrainedTowers

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


class SingularValues(nn.Module):
    """A frozen weight with trained singular values: W -> W + U diag(s - s₀) Vᵀ, which is U diag(s) Vᵀ.

    In this form, training starts at exactly W.
    """

    start: Tensor  # s₀, (P, r)
    left: Tensor  # U, (P, m, r)
    right: Tensor  # Vᵀ, (P, r, n)

    def __init__(self, matrices: Tensor) -> None:
        """Decompose the P matrices (P, m, n) of a weight, which stand below each other in it."""
        super().__init__()
        left, values, right = torch.linalg.svd(matrices.detach(), full_matrices=False)
        self.values = nn.Parameter(values.clone())  # s, (P, r) with r = min(m, n)
        self.register_buffer("start", values, persistent=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """(P m, n) -> (P m, n)."""
        change = self.left * (self.values - self.start)[:, None]  # (P, m, r)
        return weight + (change @ self.right).flatten(0, 1)


class SvdTowers(TrainedTowers):
    """Both towers of a frozen CLIP with trained singular values."""

    def __init__(self, encoder: ClipEncoder) -> None:
        """Decompose the weights of attention and MLP of every block in a copy of ``encoder``'s towers.

        Raises TowerError if a tower has no such weights.
        """
        encoder.require(("projections",), "trained singular values")
        super().__init__(encoder)
        self.matrices = nn.ModuleList()
        for tower in self.towers():
            for weight in (weight for block in tower.blocks() for weight in block.weights()):
                values = SingularValues(weight.matrices())
                parametrize.register_parametrization(weight.module, weight.parameter, values, unsafe=True)
                self.matrices.append(values)
