"""MedFocusCLIP (arXiv 2501.03839): fusion, composite loss, head and probe over CLIP's towers.

The paper's symbols: I image features, T class texts, M = F(T, I) fused features, C the head,
L = λ L_c + (1 - λ) L_e. The focus x ⊙ m has happened before: the inputs are features of
focused pictures. The authors published no code; where the paper leaves a choice open the
docstring says what is done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.methods.protocol import Support
from medfocus.probe import Probe, fit_probe, stratified_folds
from medfocus.training import train

if TYPE_CHECKING:
    from medfocus.encoders import ClipEncoder


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, labels: Tensor, logit_scale: float
) -> Tensor:
    """L_c: InfoNCE over the unique classes of the batch.

    i2t = -mean_i log softmax_k(s I_i·T_k)[y_i] over the classes present; t2i = the mean over
    those classes of the mean over their pictures i of -log softmax_j(s I_j·T_k)[i]. The diagonal
    form of CLIP's own training would count two pictures of one class as each other's negatives.

    Args:
        image_features: (B, D) L2-normalised.
        text_features: (K, D) L2-normalised, one row a class.
        labels: (B,) integers in [0, K).
        logit_scale: s.

    Returns:
        ½ (i2t + t2i), a scalar.
    """
    present, position = labels.unique(return_inverse=True)  # (P,), (B,)
    logits = logit_scale * image_features @ text_features[present].T  # (B, D) @ (D, P) -> (B, P)
    i2t = functional.cross_entropy(logits, position)
    positives = functional.one_hot(position, len(present)).to(logits.dtype)  # (B, P)
    log_share = logits.log_softmax(dim=0)  # over the batch's pictures
    t2i = -((positives * log_share).sum(dim=0) / positives.sum(dim=0)).mean()
    return (i2t + t2i) / 2


class Adapter(nn.Module):
    """x -> norm(x + W2 relu(W1 x)); W2 starts at zero, so it starts as the identity."""

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
    """M = norm(I + γ T̄) with T̄ = softmax_k(s I Tᵀ) T; γ is learnt and starts at 0."""

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
    """M = [I ; s I Tᵀ], the class scores centred and L2-normalised so that neither half drowns the other."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.out_features = dim + classes

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
        """(B, D), (K, D) -> (B, D + K)."""
        scores = logit_scale * image_features @ text_features.T  # (B, K)
        scores = functional.normalize(scores - scores.mean(dim=-1, keepdim=True), dim=-1)
        return torch.cat([image_features, scores], dim=-1)


def _attended_text(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """T̄ = a T with a = softmax_k(s I Tᵀ): every class's text enters, the label never does. -> (B, D)."""
    return (logit_scale * image_features @ text_features.T).softmax(dim=-1) @ text_features


FUSIONS: dict[str, type[SoftmaxTextFusion] | type[GatedFusion] | type[ConcatFusion]] = {
    "softmax-text": SoftmaxTextFusion,
    "gated": GatedFusion,
    "concat": ConcatFusion,
}


class CosineHead(nn.Module):
    """C(M) = s cos(M, W): weights of its own, one direction a class."""

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
    """C(M) = W M + b, from zero."""

    def __init__(self, dim: int, classes: int, logit_scale: float) -> None:
        super().__init__(dim, classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def imprint(self, fused: Tensor, labels: Tensor) -> None:
        """Stays at zero."""


HEADS: dict[str, type[CosineHead] | type[LinearHead]] = {"cosine": CosineHead, "linear": LinearHead}


class FusedClassifier(nn.Module):
    """The end of the picture tower, residual adapters on I and T, the fusion F, and the head C.

    An input is what the frozen part of the tower gave, and behind it, where ``patches`` is not 0, so many
    patch features, of CLIP's blocks or of SAM2. ``scale_patches`` standardises those; they stand behind M.
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

    def scale_patches(self, inputs: Tensor) -> None:
        """Standardise patch features by those of inputs (N, D + P), so that all together have length one."""
        if self.patches:
            features = inputs[:, -self.patches :].float()
            self.patch_mean.copy_(features.mean(dim=0))
            self.patch_scale.copy_((features.std(dim=0, correction=0) + 1e-3) * self.patches**0.5)

    def adapt(self, inputs: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...), class texts (K, D) -> I (B, D), T (K, D) after their adapters, L2-normalised."""
        towards = inputs[:, : -self.patches] if self.patches else inputs
        return self.image_adapter(self.tower(towards)), self.text_adapter(text_features)

    def merge(self, image: Tensor, text: Tensor, inputs: Tensor) -> Tensor:
        """M of adapted I (B, D) and T (K, D), with the patch features of inputs (B, ...) -> (B, D' + P)."""
        fused = self.fusion(image, text, self.logit_scale)
        if not self.patches:
            return fused
        return torch.cat([fused, (inputs[:, -self.patches :] - self.patch_mean) / self.patch_scale], dim=-1)

    def fuse(self, inputs: Tensor, text_features: Tensor) -> Tensor:
        """M for inputs (B, ...) and the texts of all classes (K, D) -> (B, D' + P)."""
        return self.merge(*self.adapt(inputs, text_features), inputs)

    def loss(self, inputs: Tensor, text_features: Tensor, labels: Tensor, weight: float) -> Tensor:
        """λ L_c + (1 - λ) L_e for a batch (B, ...), (K, D), (B,); ``weight`` is λ."""
        image, text = self.adapt(inputs, text_features)
        loss_e = functional.cross_entropy(self.head(self.merge(image, text, inputs)), labels)
        return weight * contrastive_loss(image, text, labels, self.logit_scale) + (1 - weight) * loss_e


@dataclass
class MedFocusClip:
    """The paper's method: adapters, fusion and head train on cached views of a frozen trunk.

    With nothing trainable before I and T the contrastive term would have no gradient; that is
    what the adapters are for. With ``blocks`` the last blocks of the picture tower train too. With
    ``layers`` the frozen tower's patch features join M, with ``segmenter_grid`` those of SAM2's own
    image encoder: where in the picture something is, which the pooled I has lost. Where
    ``contrastive_weights`` holds several λ, one is chosen by stratified cross-validation inside the
    support.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    encoder: ClipEncoder
    fusion: str  # one of FUSIONS
    head: str  # one of HEADS
    contrastive_weights: tuple[float, ...]  # candidates for λ in [0, 1]
    blocks: int  # of the picture tower that train, from its end; 0: the towers are frozen
    layers: tuple[int, ...]  # blocks, counted from 1, whose patch features join M; 0: the embedding
    grid: int  # cells a side to which the patch features of each layer are averaged
    segmenter_grid: int  # cells a side to which SAM2's picture features are averaged; 0: they stay out of M
    hidden: int  # width of the adapters' bottleneck
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    folds: int  # of the cross-validations that choose λ and C
    contrastive_weight_: float = field(init=False)
    classifier_: FusedClassifier = field(init=False, repr=False)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)
    probe_: Probe = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (("fusion", self.fusion, FUSIONS), ("head", self.head, HEADS)):
            if value not in known:
                raise ValueError(f"medfocusclip: {name} is {value!r}; use one of {', '.join(known)}.")
        if not self.contrastive_weights or not all(0 <= w <= 1 for w in self.contrastive_weights):
            raise ValueError(
                f"medfocusclip: contrastive_weights is {list(self.contrastive_weights)}; "
                "give one or more values of λ in [0, 1]."
            )
        if self.segmenter_grid < 0:
            raise ValueError(f"medfocusclip: segmenter_grid is {self.segmenter_grid}; use 0 to leave it out.")
        if self.blocks and (self.layers or self.segmenter_grid):
            raise ValueError(
                f"medfocusclip: blocks is {self.blocks}, layers {list(self.layers)} and segmenter_grid "
                f"{self.segmenter_grid}; patch features are of a frozen tower. Set blocks to 0, or layers "
                "to [] and segmenter_grid to 0."
            )

    @property
    def embedding(self) -> str:
        """The frozen part: CLIP's image features, with patch features, or tokens where blocks train."""
        if self.blocks:
            return f"tokens-{self.blocks}"
        name = f"layers-{'-'.join(map(str, self.layers))}-{self.grid}" if self.layers else "features"
        return f"{name}-segmenter-{self.segmenter_grid}" if self.segmenter_grid else name

    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures (B, S, S, 3) uint8 -> I (B, D), with patch features (B, D + P), or tokens (B, L, W)."""
        pixels = self.encoder.preprocess(pictures)
        if self.blocks:
            return self.encoder.trunk(pixels, self.blocks)
        if self.layers:
            features = self.encoder.encode_layers(pixels, self.layers, self.grid)
        else:
            features = self.encoder.encode_images(pixels)
        if not self.segmenter_grid:
            return features
        return torch.cat([features, self.encoder.describe(pictures, self.segmenter_grid)], dim=1)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose λ, train adapters, fusion and head, then probe the frozen fused features."""
        seed = generator.initial_seed() % 2**32
        labels, groups = support.labels.numpy(), support.groups.numpy()
        self.text_features_ = support.text_features
        self.contrastive_weight_ = self._choose_weight(support, seed)
        self.classifier_ = self._train(support, self.contrastive_weight_, generator)
        fused = self.encode(support.inputs[0]).numpy()  # (N, D')
        self.probe_ = fit_probe(fused, labels, groups, folds=self.folds, seed=seed)
        return self

    def _choose_weight(self, support: Support, seed: int) -> float:
        """The λ whose heads give the held-out folds the highest log-likelihood."""
        pairs = stratified_folds(support.labels.numpy(), support.groups.numpy(), self.folds, seed)
        if len(self.contrastive_weights) == 1 or not pairs:
            return self.contrastive_weights[len(self.contrastive_weights) // 2]

        def held_out_loss(weight: float) -> float:
            total = 0.0
            for fit, held in pairs:
                classifier = self._train(support.subset(fit), weight, torch.Generator().manual_seed(seed))
                out = support.subset(held)
                with torch.no_grad():
                    logits = classifier.head(self._fused(classifier, out.inputs[0], out.text_features))
                    total += float(functional.cross_entropy(logits, out.labels, reduction="sum"))
            return total

        return min(self.contrastive_weights, key=held_out_loss)

    def _train(self, support: Support, weight: float, generator: torch.Generator) -> FusedClassifier:
        inputs, text, labels = support.inputs, support.text_features, support.labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            classifier = self._untrained(text, inputs.shape[-1])
        classifier.scale_patches(inputs[0])
        with torch.no_grad():
            classifier.head.imprint(self._fused(classifier, inputs[0], text), labels)
        train(
            classifier.parameters(),
            lambda index, view: classifier.loss(inputs[view, index].float(), text, labels[index], weight),
            labels,
            views=len(inputs),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            generator=generator,
        )
        return classifier.eval()

    def _untrained(self, text_features: Tensor, width: int) -> FusedClassifier:
        classes, dim = text_features.shape
        return FusedClassifier(
            dim,
            classes,
            fusion=self.fusion,
            head=self.head,
            hidden=self.hidden,
            logit_scale=self.encoder.logit_scale,
            tower=self.encoder.tail(self.blocks) if self.blocks else None,
            patches=0 if self.blocks else width - dim,
        )

    @torch.no_grad()
    def _fused(self, classifier: FusedClassifier, inputs: Tensor, text_features: Tensor) -> Tensor:
        """M for any number of inputs (N, ...), a batch at a time -> (N, D')."""
        return torch.cat([classifier.fuse(part.float(), text_features) for part in inputs.split(256)])

    def encode(self, inputs: Tensor) -> Tensor:
        """Fused features M: (N, ...) -> (N, D')."""
        return self._fused(self.classifier_, inputs, self.text_features_)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, ...) -> logits (N, K) of the probe on M and of the head C."""
        fused = self.encode(inputs)
        return {
            "probe": torch.from_numpy(self.probe_.logits(fused.numpy())),
            "head": self.classifier_.head(fused),
        }

    def state(self) -> dict[str, Tensor]:
        """Trained blocks, adapters, fusion, head, class texts, probe and the chosen λ."""
        classifier = {f"classifier.{name}": value for name, value in self.classifier_.state_dict().items()}
        return {
            "text_features": self.text_features_,
            "contrastive_weight": torch.tensor(self.contrastive_weight_, dtype=torch.float64),
            **self.probe_.state(),
            **classifier,
        }

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_ = state["text_features"]
        self.contrastive_weight_ = float(state["contrastive_weight"])
        self.probe_ = Probe.load(state)
        width = self.text_features_.shape[1] + len(state["classifier.patch_mean"])
        self.classifier_ = self._untrained(self.text_features_, width)
        self.classifier_.load_state_dict(
            {k.removeprefix("classifier."): v for k, v in state.items() if k.startswith("classifier.")}
        )
        self.classifier_.eval()
        return self
