"""MedFocusCLIP (arXiv 2501.03839): fusion, composite loss, head and probe on CLIP's towers.

The inputs are focused images x ⊙ m, or features of them. ``medfocus.methods.fusion`` holds the equations. The
authors published no code; where the paper leaves a choice open, a docstring states the choice made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from medfocus.clip.lora import LoraTowers, check_lora
from medfocus.clip.prompts import class_embeddings
from medfocus.learning.folds import seed_of
from medfocus.learning.method import IMAGES, Method, Support, with_prefix
from medfocus.learning.probe import Probe, fit_probe
from medfocus.learning.selection import choose
from medfocus.learning.text_prior import beats_chance, choose_c, fit_weights
from medfocus.learning.training import Schedule, seeded, train
from medfocus.methods.fusion import FUSIONS, HEADS, FusedClassifier

TUNINGS = ("adapter", "lora", "full")


@dataclass
class MedFocusClip(Schedule, Method):
    """Adapters, fusion and head always train; ``tuning`` sets the trained part of the towers.

    "adapter": the towers are frozen, and training uses cached views of their features. The adapters on I and
    T give the contrastive term a gradient. ``layers`` adds patch features of the frozen image encoder to M,
    and ``segmenter_grid`` adds patch features of SAM2's image encoder. Both restore the positions that the
    pooled I has lost.

    "lora": low-rank updates train in every attention of both towers, on images. Every step encodes T again,
    from all templates, so the whole loss has a gradient in both towers. The adapters follow the towers.

    "full": the last ``blocks`` blocks of the image encoder train, on the cached tokens in front of them.

    Cross-validation inside the support chooses λ from ``contrastive_weights``; the middle candidate is used
    if no fold can be made.

    The paper's classifier on M knows the text only through M. With ``text_prior``, the probe on M starts from
    the zero-shot classifier (``medfocus.learning.text_prior``), and the head's logits are averaged with the
    zero-shot logits. If the text explains the support's labels no better than chance, the method has the form
    of the paper.
    """

    takes_views: ClassVar[bool] = True
    tuning: str  # one of TUNINGS
    fusion: str  # one of FUSIONS
    head: str  # one of HEADS
    contrastive_weights: tuple[float, ...]  # candidates for λ in [0, 1]
    blocks: int  # number of last blocks of the image encoder to train in "full"; else 0
    lora_rank: int  # r of the updates W + (α/√r) B A, in "lora"
    lora_alpha: float  # α of the updates
    lora_dropout: float  # on the input of the low-rank path
    layers: tuple[int, ...]  # patch features of these blocks, counted from 1, join M; 0: the embedding
    grid: int  # cells a side to which the patch features of each layer are averaged
    segmenter_grid: int  # cells a side to which SAM2's image features are averaged; 0: not in M
    hidden: int  # width of the adapters' bottleneck
    max_steps: int  # upper bound on optimisation steps; the first epoch always runs in full
    folds: int  # of the cross-validations that choose λ and C
    text_prior: bool  # the zero-shot classifier is the prior of the probe; False: the form of the paper
    contrastive_weight_: float = field(init=False)
    classifier_: FusedClassifier = field(init=False, repr=False)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)
    untrained_: FusedClassifier = field(init=False, repr=False)  # no label has changed it
    untrained_text_: Tensor = field(init=False, repr=False)  # (K, D)
    trusts_text_: bool = field(init=False)  # whether the probe and the head build on the zero-shot logits
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
                f"medfocusclip: tuning is {self.tuning!r} and blocks {self.blocks}; blocks train only "
                "in 'full'. Set blocks to 1 or more with 'full', or to 0 with another tuning."
            )
        if self.tuning != "adapter" and (self.layers or self.segmenter_grid):
            raise ValueError(
                f"medfocusclip: tuning is {self.tuning!r}, layers {list(self.layers)} and segmenter_grid "
                f"{self.segmenter_grid}; patch features need a frozen encoder. Set tuning to adapter, or "
                "layers to [] and segmenter_grid to 0."
            )

    @property
    def needs_towers(self) -> bool:
        """True for low-rank updates: they run both towers in ``fit``."""
        return self.tuning == "lora"

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``Method.needs``."""
        return ("projections",) if self.tuning == "lora" else ()

    def check_towers(self, caller: str) -> None:
        """See ``Method.check_towers``; the layers and their grid count too."""
        super().check_towers(caller)
        if self.layers:
            self.encoder.check_layers(self.layers, self.grid, caller)

    @property
    def trained_blocks(self) -> int:
        """See ``Method.trained_blocks``."""
        return self.blocks

    @property
    def note(self) -> str:
        """The part that the text has in the fitted probe; see ``Method.note``."""
        if not self.text_prior or not hasattr(self, "trusts_text_"):
            return ""
        return f"text prior, C = {self.probe_.C:g}" if self.trusts_text_ else "text no better than chance"

    @property
    def embedding(self) -> str:
        """Image features, with patch features if set; tokens for "full", the images for "lora"."""
        if self.tuning == "lora":
            return IMAGES
        if self.tuning == "full":
            return f"tokens-{self.blocks}"
        name = f"layers-{'-'.join(map(str, self.layers))}-{self.grid}" if self.layers else "features"
        return f"{name}-segmenter-{self.segmenter_grid}" if self.segmenter_grid else name

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> I (B, D), with patches (B, D + P), tokens (B, L, W) or the images."""
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
        """Choose λ, train, then fit the probe on the frozen fused features.

        Raises ValueError in "lora" if the support has no prompts, or as ``LoraTowers`` does.
        """
        if self.tuning == "lora" and not support.prompts:
            raise ValueError(
                "medfocusclip: tuning 'lora' trains the text tower, but support.prompts is empty. Give the "
                "prompts of each class."
            )
        seed = seed_of(generator)
        self.contrastive_weight_ = self._choose_weight(support, seed)
        self.classifier_ = self._train(support, self.contrastive_weight_, generator)
        with torch.no_grad():
            self.text_features_ = self._texts(self.classifier_, support)
        with seeded(seed):
            self.untrained_ = self._untrained(support.text_features, support.inputs.shape[-1]).eval()
        self.untrained_text_ = support.text_features
        self.probe_ = self._fit_probe(support, seed)
        return self

    def _fit_probe(self, support: Support, seed: int) -> Probe:
        """Fit the probe on M, on top of the zero-shot logits if the text is better than chance.

        C of the prior is chosen on M of the untrained classifier, because the trained M of a held-out image
        has seen its label.
        """
        inputs, labels, groups = support.inputs[0], support.labels.numpy(), support.groups.numpy()
        fused = self.encode(inputs).double().numpy()  # (N, D')
        zero_shot = self._zero_shot(inputs).double().numpy() if self.text_prior else None  # (N, K)
        self.trusts_text_ = zero_shot is not None and beats_chance(zero_shot, labels)
        if zero_shot is None or not self.trusts_text_:
            return fit_probe(fused, labels, groups, folds=self.folds, seed=seed)
        self.untrained_.scale_patches(inputs)
        unlabelled = self._fused(self.untrained_, inputs, self.untrained_text_).double().numpy()
        c = choose_c(unlabelled, labels, groups, zero_shot, folds=self.folds, seed=seed)
        weights = fit_weights(fused, labels, zero_shot, c)
        return Probe(weights, np.zeros(len(weights)), c)

    def _choose_weight(self, support: Support, seed: int) -> float:
        """Return the λ with the highest held-out log-likelihood of the head."""

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            for weight in self.contrastive_weights:
                classifier = self._train(fit, weight, torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    fused = self._fused(classifier, held.inputs[0], self._texts(classifier, held))
                    logits = classifier.head(fused)
                yield logits

        weights = self.contrastive_weights
        otherwise = weights[len(weights) // 2]
        return choose(weights, support, held_out_logits, folds=self.folds, seed=seed, otherwise=otherwise)

    def _train(self, support: Support, weight: float, generator: torch.Generator) -> FusedClassifier:
        inputs, labels = support.inputs, support.labels

        def loss(index: Tensor, view: Tensor) -> Tensor:
            text = self._texts(classifier, support)
            return classifier.loss(inputs[view, index].float(), text, labels[index], weight)

        with seeded(generator.initial_seed()):  # for the modules' initial weights and LoRA's dropout
            classifier = self._untrained(support.text_features, inputs.shape[-1])
            classifier.scale_patches(inputs[0])
            with torch.no_grad():
                text = self._texts(classifier, support)
                classifier.head.imprint(self._fused(classifier, inputs[0], text), labels)
            train(
                classifier.parameters(),
                loss,
                labels,
                self,
                views=len(inputs),
                generator=generator,
                max_steps=self.max_steps,
            )
        return classifier.eval()

    @staticmethod
    def _texts(classifier: FusedClassifier, support: Support) -> Tensor:
        """Return T (K, D): with a gradient from the updated text tower, or from the frozen text tower."""
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
        """Return the trained part of the towers with its initial weights; None if the towers are frozen."""
        if self.tuning == "full":
            return self.encoder.tail(self.blocks)
        if self.tuning == "lora":
            return LoraTowers(
                self.encoder, rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout
            )
        return None

    @torch.no_grad()
    def _fused(self, classifier: FusedClassifier, inputs: Tensor, text_features: Tensor) -> Tensor:
        """Compute M batch by batch: inputs (N, ...) -> (N, D')."""
        return torch.cat([classifier.fuse(part.float(), text_features) for part in self._batches(inputs)])

    def _batches(self, inputs: Tensor) -> Sequence[Tensor]:
        return inputs.split(64 if self.tuning == "lora" else 256)

    @torch.no_grad()
    def _zero_shot(self, inputs: Tensor) -> Tensor:
        """Compute s I Tᵀ of the frozen towers batch by batch: inputs (N, ...) -> (N, K)."""
        adapted = (
            self.untrained_.adapt(part.float(), self.untrained_text_) for part in self._batches(inputs)
        )
        return torch.cat([self.text_logits(image, text) for image, text in adapted])

    def encode(self, inputs: Tensor) -> Tensor:
        """Fused features M: (N, ...) -> (N, D')."""
        return self._fused(self.classifier_, inputs, self.text_features_)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, ...) -> logits (N, K) of the probe on M and of the head C."""
        fused = self.encode(inputs)
        probe, head = torch.from_numpy(self.probe_.logits(fused.numpy())), self.classifier_.head(fused)
        if self.trusts_text_:
            zero_shot = self._zero_shot(inputs)
            probe, head = zero_shot + probe, (zero_shot + head) / 2
        return {"probe": probe, "head": head}

    def state(self) -> dict[str, Tensor]:
        """Return trained parts, adapters, fusion, head, text features, probe, λ and the trust in the text."""
        return {
            "text_features": self.text_features_,
            "untrained_text": self.untrained_text_,
            "trusts_text": torch.tensor(self.trusts_text_),
            "contrastive_weight": torch.tensor(self.contrastive_weight_, dtype=torch.float64),
            **self.probe_.state(),
            **self.classifier_.state_dict(prefix="classifier."),
        }

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.text_features_, self.untrained_text_ = state["text_features"], state["untrained_text"]
        self.trusts_text_ = bool(state["trusts_text"])
        self.contrastive_weight_ = float(state["contrastive_weight"])
        self.probe_ = Probe.load(state)
        width = self.text_features_.shape[1] + len(state["classifier.patch_mean"])
        self.untrained_ = self._untrained(self.untrained_text_, width).eval()
        self.classifier_ = self._untrained(self.text_features_, width)
        self.classifier_.load_state_dict(with_prefix(state, "classifier."))
        self.classifier_.eval()
        return self
