"""MedFocusCLIP's equations (arXiv 2501.03839): the contrastive loss, adapters, fusions, heads.

The paper's symbols: I image features, T class texts, M = F(T, I) fused features, C the head,
L = λ L_c + (1 - λ) L_e.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: float
) -> Tensor:
    """Return L_c, InfoNCE over the unique classes of the batch.

    Over the classes k of the batch, i2t = -mean_i log softmax_k(s I_i·T_k)[y_i] and
    t2i = -mean_k mean_{i∈k} log softmax_j(s I_j·T_k)[i]. The diagonal form of CLIP's training would make
    images of one class negatives of each other.

    Args:
        image_features: (B, D) L2-normalised.
        text_features: (K, D) L2-normalised, one row per class.
        labels: (B,) integers in [0, K).
        logit_scale: s.

    Returns:
        ½ (i2t + t2i), a scalar.
    """
    present, position = labels.unique(return_inverse=True)  # (P,), (B,)
    logits = logit_scale * image_features @ text_features[present].T  # (B, D) @ (D, P) -> (B, P)
    i2t = functional.cross_entropy(logits, position)
    positives = functional.one_hot(position, len(present)).to(logits.dtype)  # (B, P)
    log_share = logits.log_softmax(dim=0)  # over the batch's images
    t2i = -((positives * log_share).sum(dim=0) / positives.sum(dim=0)).mean()
    return (i2t + t2i) / 2


class Adapter(nn.Module):
    """x -> norm(x + W2 relu(W1 x)); W2 starts at zero, so the adapter starts as the identity."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), L2-normalised."""
        return functional.normalize(x + self.up(self.down(x).relu()), dim=-1)


class SoftmaxTextFusion(nn.Module):
    """M = norm(I + γ T̄) with T̄ = softmax_k(s I Tᵀ) T; γ is learned and starts at 0."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.out_features = dim
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
        """(B, D), (K, D) -> (B, D)."""
        mean_text = _attended_text(image_features, text_features, logit_scale)
        return functional.normalize(image_features + self.gamma * mean_text, dim=-1)


class GatedFusion(nn.Module):
    """M = norm(g ⊙ I + (1 - g) ⊙ T̄), g = sigmoid(W [I; T̄] + b); b starts at 4, so M starts near I."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.out_features = dim
        self.gate = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 4.0)

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
        """(B, D), (K, D) -> (B, D)."""
        mean_text = _attended_text(image_features, text_features, logit_scale)
        gate = self.gate(torch.cat([image_features, mean_text], dim=-1)).sigmoid()
        return functional.normalize(gate * image_features + (1 - gate) * mean_text, dim=-1)


class ConcatFusion(nn.Module):
    """M = [I ; s I Tᵀ], with class scores centred and L2-normalised to the scale of I."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.out_features = dim + classes

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
        """(B, D), (K, D) -> (B, D + K)."""
        scores = logit_scale * image_features @ text_features.T  # (B, K)
        scores = functional.normalize(scores - scores.mean(dim=-1, keepdim=True), dim=-1)
        return torch.cat([image_features, scores], dim=-1)


def _attended_text(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """T̄ = a T with a = softmax_k(s I Tᵀ), (B, D): uses the texts of all classes and never the label."""
    return (logit_scale * image_features @ text_features.T).softmax(dim=-1) @ text_features


FUSIONS: dict[str, type[SoftmaxTextFusion] | type[GatedFusion] | type[ConcatFusion]] = {
    "softmax-text": SoftmaxTextFusion,
    "gated": GatedFusion,
    "concat": ConcatFusion,
}


class CosineHead(nn.Module):
    """C(M) = s cos(M, W), one learned direction per class."""

    def __init__(self, dim: int, classes: int, logit_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) / dim**0.5)
        self.logit_scale = logit_scale

    @torch.no_grad()
    def imprint(self, fused: Tensor, labels: Tensor) -> None:
        """Start at the class means of fused features (N, D'), (N,) (Qi et al., arXiv 1712.07136)."""
        onehot = functional.one_hot(labels, len(self.weight)).to(fused.dtype)  # (N, K)
        self.weight.copy_(functional.normalize(onehot.T @ fused, dim=-1))

    def forward(self, fused: Tensor) -> Tensor:
        """(B, D') -> class logits (B, K)."""
        return (
            self.logit_scale
            * functional.normalize(fused, dim=-1)
            @ functional.normalize(self.weight, dim=-1).T
        )


class LinearHead(nn.Linear):
    """C(M) = W M + b, starting at zero."""

    def __init__(self, dim: int, classes: int, logit_scale: float) -> None:
        super().__init__(dim, classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def imprint(self, fused: Tensor, labels: Tensor) -> None:
        """Keep the weights at zero."""


HEADS: dict[str, type[CosineHead] | type[LinearHead]] = {"cosine": CosineHead, "linear": LinearHead}


class Inputs(NamedTuple):
    """The two parts of a classifier's inputs, for V views of N images."""

    tower: Tensor  # (V, N, ...) of the trained end of the image encoder
    patches: Tensor  # (V, N, P) patch features of frozen encoders

    def views(self, count: int) -> Inputs:
        """Return the first ``count`` views."""
        return Inputs(self.tower[:count], self.patches[:count])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield both parts of all views, in batches of at most ``size``."""
        yield from zip(*(part.flatten(0, 1).split(size) for part in self), strict=True)


class FusedClassifier(nn.Module):
    """The trained end of the image encoder, residual adapters on I and T, the fusion F, and the head C.

    An input of the trained end is the output of the frozen part of the image encoder. ``patches`` patch
    features, of CLIP's frozen blocks or of SAM2, are standardised by ``scale_patches`` and appended to M.
    """

    patch_mean: Tensor  # (P,)
    patch_scale: Tensor  # (P,)

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        fusion: str,
        head: str,
        hidden: int,
        logit_scale: float,
        tower: nn.Module | None = None,
        patches: int = 0,
    ) -> None:
        super().__init__()
        self.tower = tower or nn.Identity()  # (B, ...) -> (B, D), L2-normalised
        self.image_adapter = Adapter(dim, hidden)
        self.text_adapter = Adapter(dim, hidden)
        self.fusion = FUSIONS[fusion](dim, classes)
        self.head = HEADS[head](self.fusion.out_features + patches, classes, logit_scale)
        self.logit_scale = logit_scale
        self.patches = patches
        self.register_buffer("patch_mean", torch.zeros(patches))
        self.register_buffer("patch_scale", torch.ones(patches))

    def scale_patches(self, patches: Tensor) -> None:
        """Fit the standardisation of patch features (N, P), to a mean length of one."""
        if self.patches:
            features = patches.float()
            self.patch_mean.copy_(features.mean(dim=0))
            self.patch_scale.copy_((features.std(dim=0, correction=0) + 1e-3) * self.patches**0.5)

    def adapt(self, inputs: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...), text features (K, D) -> I (B, D), T (K, D) after their adapters, L2-normalised."""
        return self.image_adapter(self.tower(inputs.float())), self.text_adapter(text_features)

    def merge(self, image: Tensor, text: Tensor, patches: Tensor) -> Tensor:
        """Fuse adapted I (B, D) and T (K, D), and append patch features (B, P) -> M (B, D' + P)."""
        fused = self.fusion(image, text, self.logit_scale)
        if not self.patches:
            return fused
        return torch.cat([fused, (patches.float() - self.patch_mean) / self.patch_scale], dim=-1)

    def fuse(self, inputs: Tensor, patches: Tensor, text_features: Tensor) -> Tensor:
        """Return M for inputs (B, ...), patches (B, P), texts of all classes (K, D) -> (B, D' + P)."""
        return self.merge(*self.adapt(inputs, text_features), patches)

    def loss(
        self,
        inputs: Tensor,
        patches: Tensor,
        text_features: Tensor,
        labels: Tensor,
        weight: float,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Return λ L_c + (1 - λ) L_e for a batch (B, ...), (B, P), (K, D), (B,).

        ``weight`` is λ, and L_e gives ``smoothing`` of its target to all classes (label smoothing).
        """
        image, text = self.adapt(inputs, text_features)
        logits = self.head(self.merge(image, text, patches))
        loss_e = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        return weight * contrastive_loss(image, text, labels, self.logit_scale) + (1 - weight) * loss_e
