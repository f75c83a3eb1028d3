"""MedFocusCLIP (arXiv 2501.03839): fusion, composite loss, head and probe over CLIP's towers.

The focus x ⊙ m has happened before: the inputs are focused images, or features of them. The
equations are in ``medfocus.methods.fusion``. The authors published no code; where the paper leaves a
choice open the docstring says what is done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.lora import LoraTowers, check_lora
from medfocus.clip.prompts import class_embeddings
from medfocus.learning.method import IMAGES, Support
from medfocus.learning.probe import Probe, fit_probe, stratified_folds
from medfocus.learning.training import train
from medfocus.methods.fusion import FUSIONS, HEADS, Adapter, FusedClassifier, contrastive_loss

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

__all__ = ["FUSIONS", "HEADS", "TUNINGS", "Adapter", "FusedClassifier", "MedFocusClip", "contrastive_loss"]

TUNINGS = ("adapter", "lora", "full")


@dataclass
class MedFocusClip:
    """The paper's method: adapters, fusion and head train, and of the towers what ``tuning`` says.

    "adapter" leaves the towers frozen and trains on cached views of their features. With nothing
    trainable before I and T the contrastive term would have no gradient; that is what the adapters are
    for. With ``layers`` the frozen tower's patch features join M, with ``segmenter_grid`` those of SAM2's
    own image encoder: where in the image something is, which the pooled I has lost.

    "lora" trains low-rank updates in every attention of both towers, on the images themselves. T is
    encoded anew at every step, from all templates, so the whole loss has its gradient in both towers; the
    adapters stay in place behind them.

    "full" trains the last ``blocks`` blocks of the image encoder, on the cached tokens before them.

    Where ``contrastive_weights`` holds several λ, one is chosen by stratified cross-validation inside the
    support.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    encoder: ClipEncoder
    tuning: str  # one of TUNINGS
    fusion: str  # one of FUSIONS
    head: str  # one of HEADS
    contrastive_weights: tuple[float, ...]  # candidates for λ in [0, 1]
    blocks: int  # of the image encoder that train, from its end, in "full"; else 0
    lora_rank: int  # r of the updates W + (α/√r) B A, in "lora"
    lora_alpha: float  # their α
    lora_dropout: float  # on the input of the low-rank path
    layers: tuple[int, ...]  # blocks, counted from 1, whose patch features join M; 0: the embedding
    grid: int  # cells a side to which the patch features of each layer are averaged
    segmenter_grid: int  # cells a side to which SAM2's image features are averaged; 0: they stay out of M
    hidden: int  # width of the adapters' bottleneck
    epochs: int
    max_steps: int  # a bound on epochs, in optimisation steps; one epoch is always made
    batch_size: int
    lr: float
    weight_decay: float
    folds: int  # of the cross-validations that choose λ and C
    contrastive_weight_: float = field(init=False)
    classifier_: FusedClassifier = field(init=False, repr=False)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)
    probe_: Probe = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = (
            ("tuning", self.tuning, TUNINGS),
            ("fusion", self.fusion, FUSIONS),
            ("head", self.head, HEADS),
        )
        for name, value, known in names:
            if value not in known:
                raise ValueError(f"medfocusclip: {name} is {value!r}; use one of {', '.join(known)}.")
        if not self.contrastive_weights or not all(0 <= w <= 1 for w in self.contrastive_weights):
            raise ValueError(
                f"medfocusclip: contrastive_weights is {list(self.contrastive_weights)}; "
                "give one or more values of λ in [0, 1]."
            )
        if self.segmenter_grid < 0:
            raise ValueError(f"medfocusclip: segmenter_grid is {self.segmenter_grid}; use 0 to leave it out.")
        check_lora("medfocusclip", rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout)
        if self.blocks < 0 or (self.tuning == "full") != (self.blocks > 0):
            raise ValueError(
                f"medfocusclip: tuning is {self.tuning!r} and blocks {self.blocks}; blocks train in 'full' "
                "and there alone. Set blocks to 1 or more with 'full', to 0 with another tuning."
            )
        if self.tuning != "adapter" and (self.layers or self.segmenter_grid):
            raise ValueError(
                f"medfocusclip: tuning is {self.tuning!r}, layers {list(self.layers)} and segmenter_grid "
                f"{self.segmenter_grid}; patch features are of a frozen tower. Set tuning to adapter, or "
                "layers to [] and segmenter_grid to 0."
            )

    @property
    def needs_towers(self) -> bool:
        """Only low-rank updates run both towers in ``fit``; the others have cached what comes before."""
        return self.tuning == "lora"

    @property
    def embedding(self) -> str:
        """The frozen part: image features, with patch features; in "full" tokens, in "lora" nothing."""
        if self.tuning == "lora":
            return IMAGES
        if self.tuning == "full":
            return f"tokens-{self.blocks}"
        name = f"layers-{'-'.join(map(str, self.layers))}-{self.grid}" if self.layers else "features"
        return f"{name}-segmenter-{self.segmenter_grid}" if self.segmenter_grid else name

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> I (B, D), with patches (B, D + P), tokens (B, L, W) or as is."""
        if self.tuning == "lora":
            return images
        pixels = self.encoder.preprocess(images)
        if self.tuning == "full":
            return self.encoder.trunk(pixels, self.blocks)
        if self.layers:
            features = self.encoder.encode_layers(pixels, self.layers, self.grid)
        else:
            features = self.encoder.encode_images(pixels)
        if not self.segmenter_grid:
            return features
        return torch.cat([features, self.encoder.describe(images, self.segmenter_grid)], dim=1)

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Choose λ, train what trains, then probe the frozen fused features.

        Raises ValueError in "lora" where the support brings no prompts, or as ``LoraTowers`` does.
        """
        if self.tuning == "lora" and not support.prompts:
            raise ValueError(
                "medfocusclip: tuning 'lora' trains the text tower, but support.prompts is empty. Give the "
                "texts of each class."
            )
        seed = generator.initial_seed() % 2**32
        labels, groups = support.labels.numpy(), support.groups.numpy()
        self.contrastive_weight_ = self._choose_weight(support, seed)
        self.classifier_ = self._train(support, self.contrastive_weight_, generator)
        with torch.no_grad():
            self.text_features_ = self._texts(self.classifier_, support)
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
                    fused = self._fused(classifier, out.inputs[0], self._texts(classifier, out))
                    logits = classifier.head(fused)
                    total += float(functional.cross_entropy(logits, out.labels, reduction="sum"))
            return total

        return min(self.contrastive_weights, key=held_out_loss)

    def _train(self, support: Support, weight: float, generator: torch.Generator) -> FusedClassifier:
        inputs, labels = support.inputs, support.labels

        def loss(index: Tensor, view: Tensor) -> Tensor:
            text = self._texts(classifier, support)
            return classifier.loss(inputs[view, index].float(), text, labels[index], weight)

        with torch.random.fork_rng(devices=[]):  # of the modules' start and LoRA's dropout
            torch.manual_seed(generator.initial_seed())
            classifier = self._untrained(support.text_features, inputs.shape[-1])
            classifier.scale_patches(inputs[0])
            with torch.no_grad():
                text = self._texts(classifier, support)
                classifier.head.imprint(self._fused(classifier, inputs[0], text), labels)
            train(
                classifier.parameters(),
                loss,
                labels,
                views=len(inputs),
                epochs=self.epochs,
                max_steps=self.max_steps,
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                generator=generator,
            )
        return classifier.eval()

    @staticmethod
    def _texts(classifier: FusedClassifier, support: Support) -> Tensor:
        """T (K, D) of the updated text tower, with its gradient, or of the frozen one."""
        if isinstance(classifier.tower, LoraTowers):
            return class_embeddings(classifier.tower, support.prompts)
        return support.text_features

    def _untrained(self, text_features: Tensor, width: int) -> FusedClassifier:
        classes, dim = text_features.shape
        return FusedClassifier(
            dim,
            classes,
            fusion=self.fusion,
            head=self.head,
            hidden=self.hidden,
            logit_scale=self.encoder.logit_scale,
            tower=self._tower(),
            patches=width - dim if self.tuning == "adapter" else 0,
        )

    def _tower(self) -> nn.Module | None:
        """What trains of the towers, before it has."""
        if self.tuning == "full":
            return self.encoder.tail(self.blocks)
        if self.tuning == "lora":
            return LoraTowers(
                self.encoder, rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout
            )
        return None

    @torch.no_grad()
    def _fused(self, classifier: FusedClassifier, inputs: Tensor, text_features: Tensor) -> Tensor:
        """M for any number of inputs (N, ...), a batch at a time -> (N, D')."""
        parts = inputs.split(64 if self.tuning == "lora" else 256)
        return torch.cat([classifier.fuse(part.float(), text_features) for part in parts])

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
        """Trained blocks or low-rank factors, adapters, fusion, head, class texts, probe and the chosen λ."""
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
