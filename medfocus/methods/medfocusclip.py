"""MedFocusCLIP (arXiv 2501.03839): fusion, composite loss, head and probe on CLIP's towers.

The inputs are focused images x ⊙ m, or features of them. ``medfocus.methods.fusion`` holds the equations. The
authors published no code; where the paper leaves a choice open, a docstring states the choice made here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
from medfocus.learning.training import Schedule, passes, seeded, train
from medfocus.methods.fusion import FUSIONS, HEADS, FusedClassifier, Inputs

TUNINGS = ("adapter", "lora", "full")
_BATCH = 64  # views for one pass of the trained end


@dataclass
class MedFocusClip(Schedule, Method):
    """Adapters, fusion and head always train; ``tuning`` sets the trained part of the towers.

    "adapter": the towers are frozen, and training uses cached views of their features. The adapters on I and
    T give the contrastive term a gradient. ``layers`` adds patch features of the frozen image encoder to M,
    and ``segmenter_grid`` adds patch features of SAM2's image encoder. Both restore the positions that the
    pooled I has lost.

    "lora": low-rank updates train in every attention of both towers, on images. Every step encodes T again,
    from all templates, so the whole loss has a gradient in both towers. The adapters follow the towers.

    "full": the last ``blocks`` blocks of the image encoder train, on the cached tokens or maps in front of
    them. M has the patch features of the frozen encoder beside the trained I. With ``blocks``, "adapter" is
    the same method with frozen blocks, so that cross-validation inside the support can choose between the two
    (``medfocus.learning.selection.Choice``). If ``flip`` allows it, M is then the mean of M over an image and
    its mirror image.

    Cross-validation inside the support chooses λ from ``contrastive_weights``; the middle candidate is used
    if no fold can be made.

    The paper's classifier on M knows the text only through M. With ``text_prior``, the probe on M starts from
    the zero-shot classifier (``medfocus.learning.text_prior``), and the head's logits are averaged with the
    zero-shot logits. If the text explains the support's labels no better than chance, the method has the form
    of the paper.
    """

    takes_views: ClassVar[bool] = True
    tuning: str  # one of TUNINGS; of a list of them, the caller selects one inside the support
    fusion: str  # one of FUSIONS
    head: str  # one of HEADS
    contrastive_weights: tuple[float, ...]  # candidates for λ in [0, 1]
    blocks: int  # number of last blocks of the image encoder that "full" trains; 0 for "lora"
    lora_rank: int  # r of the updates W + (α/√r) B A, in "lora"
    lora_alpha: float  # α of the updates
    lora_dropout: float  # on the input of the low-rank path
    layers: tuple[int, ...]  # patch features of these blocks, counted from 1, join M; 0: the embedding
    grid: int  # cells a side to which the patch features of each layer are averaged
    segmenter_grid: int  # cells a side to which SAM2's image features are averaged; 0: not in M
    hidden: int  # width of the adapters' bottleneck
    augmented: int | None  # views of each training image besides the whole image; None: as other methods
    max_steps: int  # upper bound on optimisation steps; the first epoch always runs in full
    warmup: float  # share of the steps in which the learning rate rises
    smoothing: float  # share of the target that the head's loss gives to all classes
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
        if self.blocks < 0 or (self.tuning == "full" and not self.blocks):
            raise ValueError(
                f"medfocusclip: tuning is {self.tuning!r} and blocks {self.blocks}. Set blocks to 1 or more "
                "with 'full', or to 0."
            )
        if self.tuning == "lora" and (self.blocks or self.layers or self.segmenter_grid):
            raise ValueError(
                f"medfocusclip: tuning is 'lora', blocks {self.blocks}, layers {list(self.layers)} and "
                f"segmenter_grid {self.segmenter_grid}; 'lora' updates the whole encoder. Set blocks and "
                "segmenter_grid to 0, and layers to []."
            )
        if self.blocks and self.segmenter_grid:
            raise ValueError(
                f"medfocusclip: blocks is {self.blocks} and segmenter_grid {self.segmenter_grid}; SAM2's "
                "features need tuning 'adapter' without blocks. Set one of them to 0."
            )
        for name, share in (("warmup", self.warmup), ("smoothing", self.smoothing)):
            if not 0 <= share < 1:
                raise ValueError(f"medfocusclip: {name} is {share}; use a share in [0, 1).")

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
            first = self.encoder.tower.depth - self.blocks
            if self.blocks and min(self.layers) < first:
                raise ValueError(
                    f"{caller}: layers is {list(self.layers)}, but the last {self.blocks} blocks begin after "
                    f"layer {first}. Set layers to {first} or higher, or blocks higher."
                )

    @property
    def trained_blocks(self) -> int:
        """See ``Method.trained_blocks``."""
        return self.blocks

    @property
    def note(self) -> str:
        """The tuning, and the part that the text has in the fitted probe; see ``Method.note``."""
        notes = []
        if self.blocks:
            notes.append("tuned" if self.tuning == "full" else "frozen")
        if self.text_prior and hasattr(self, "trusts_text_"):
            trusted = f"text prior, C = {self.probe_.C:g}"
            notes.append(trusted if self.trusts_text_ else "text no better than chance")
        return ", ".join(notes)

    def views(self, images: int, augmented: int) -> int:
        """See ``Method.views``; with mirror images, there are no more than passes over the images."""
        wanted = augmented if self.augmented is None else self.augmented
        return 1 + min(wanted, passes(images, self, self.max_steps)) // self._whole

    @property
    def embedding(self) -> str:
        """Image features, with patch features if set; tokens for ``blocks``, the images for "lora"."""
        if self.tuning == "lora":
            return IMAGES
        if self.blocks:
            return f"tokens-{self.blocks}-mirrored" if self._mirrors else f"tokens-{self.blocks}"
        name = f"layers-{'-'.join(map(str, self.layers))}-{self.grid}" if self.layers else "features"
        return f"{name}-segmenter-{self.segmenter_grid}" if self.segmenter_grid else name

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> I (B, D), with patches (B, D + P), tokens (B, ...) or the images.

        With ``flip``, tokens are those of the image and of its mirror image, (B, 2, ...).
        """
        if self.tuning == "lora":
            return images
        pixels = self.encoder.preprocess(images)
        if self.blocks:
            tokens = self.encoder.trunk(pixels, self.blocks)
            if not self._mirrors:
                return tokens
            encoder = replace(self.encoder, cache=None)  # it may keep the activations of ``images``
            mirrored = encoder.trunk(encoder.preprocess(images.flip(2)), self.blocks)
            return torch.stack([tokens, mirrored], dim=1)
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
        inputs = self._split(support.inputs)
        self.contrastive_weight_ = self._choose_weight(support, seed)
        self.classifier_ = self._train(inputs, support, self.contrastive_weight_, generator)
        whole = inputs.views(self._whole)
        with torch.no_grad():
            self.text_features_ = self._texts(self.classifier_, support)
        with seeded(seed):
            self.untrained_ = self._untrained(support.text_features, inputs.patches.shape[-1]).eval()
        self.untrained_text_ = support.text_features
        self.probe_ = self._fit_probe(whole, support, seed)
        return self

    @property
    def _mirrors(self) -> bool:
        """True if the inputs have tokens of each image and of its mirror image."""
        return self.flip and self.blocks > 0

    @property
    def _whole(self) -> int:
        """Number of views that show the whole image, the first ones: itself and perhaps its mirror image."""
        return 2 if self._mirrors else 1

    @torch.no_grad()
    def _split(self, inputs: Tensor) -> Inputs:
        """Return the parts of inputs (V, N, ...), in which a mirror image is a view of its own.

        The frozen blocks run here, once for all steps, if their features are needed.
        """
        if self._mirrors:
            inputs = inputs.transpose(1, 2).flatten(0, 1)
        features = inputs
        if self.blocks and (self.layers or self.tuning == "adapter"):
            frozen = self.encoder.tail(self.blocks).eval()
            parts = inputs.flatten(0, 1).split(_BATCH)
            rows = [frozen.encode_layers(part.float(), self.layers, self.grid) for part in parts]
            features = torch.cat(rows).to(inputs.dtype).unflatten(0, inputs.shape[:2])
        elif self.tuning != "adapter":
            return Inputs(inputs, torch.empty(*inputs.shape[:2], 0))
        image, patches = features[..., : self.encoder.dim], features[..., self.encoder.dim :]
        return Inputs(inputs if self.tuning == "full" else image, patches)

    def _fit_probe(self, inputs: Inputs, support: Support, seed: int) -> Probe:
        """Fit the probe on M, on top of the zero-shot logits if the text is better than chance.

        C of the prior is chosen on M of the untrained classifier, because the trained M of a held-out image
        has seen its label. For the same reason, C without a prior is fixed if blocks were trained.
        """
        labels, groups = support.labels.numpy(), support.groups.numpy()
        fused = self._fused(self.classifier_, inputs, self.text_features_).double().numpy()  # (N, D')
        zero_shot = self._zero_shot(inputs).double().numpy() if self.text_prior else None  # (N, K)
        self.trusts_text_ = zero_shot is not None and beats_chance(zero_shot, labels)
        if zero_shot is None or not self.trusts_text_:
            folds = 0 if self.tuning == "full" else self.folds
            return fit_probe(fused, labels, groups, folds=folds, seed=seed)
        self.untrained_.scale_patches(inputs.patches.flatten(0, 1))
        unlabelled = self._fused(self.untrained_, inputs, self.untrained_text_).double().numpy()
        c = choose_c(unlabelled, labels, groups, zero_shot, folds=self.folds, seed=seed)
        weights = fit_weights(fused, labels, zero_shot, c)
        return Probe(weights, np.zeros(len(weights)), c)

    def _choose_weight(self, support: Support, seed: int) -> float:
        """Return the λ with the highest held-out log-likelihood of the head."""

        def held_out_logits(fit: Support, held: Support) -> Iterable[Tensor]:
            inputs, seen = self._split(fit.inputs), self._split(held.inputs[:1])
            for weight in self.contrastive_weights:
                classifier = self._train(inputs, fit, weight, torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    yield classifier.head(self._fused(classifier, seen, self._texts(classifier, held)))

        weights = self.contrastive_weights
        otherwise = weights[len(weights) // 2]
        return choose(weights, support, held_out_logits, folds=self.folds, seed=seed, otherwise=otherwise)

    def _train(
        self, inputs: Inputs, support: Support, weight: float, generator: torch.Generator
    ) -> FusedClassifier:
        labels, patches = support.labels, inputs.patches

        def loss(index: Tensor, view: Tensor) -> Tensor:
            text = self._texts(classifier, support)
            tower, beside = inputs.tower[view, index], patches[view, index]
            return classifier.loss(tower, beside, text, labels[index], weight, self.smoothing)

        with seeded(generator.initial_seed()):  # for the modules' initial weights and LoRA's dropout
            classifier = self._untrained(support.text_features, patches.shape[-1])
            whole = inputs.views(self._whole)
            classifier.scale_patches(whole.patches.flatten(0, 1))
            with torch.no_grad():
                text = self._texts(classifier, support)
                classifier.head.imprint(self._fused(classifier, whole, text), labels)
            train(
                classifier.parameters(),
                loss,
                labels,
                self,
                views=len(patches),
                generator=generator,
                max_steps=self.max_steps,
                warmup=self.warmup,
            )
        return classifier.eval()

    @staticmethod
    def _texts(classifier: FusedClassifier, support: Support) -> Tensor:
        """Return T (K, D): with a gradient from the updated text tower, or from the frozen text tower."""
        if isinstance(classifier.tower, LoraTowers):
            return class_embeddings(classifier.tower, support.prompts)
        return support.text_features

    def _untrained(self, text_features: Tensor, patches: int) -> FusedClassifier:
        classes, dim = text_features.shape
        return FusedClassifier(
            dim,
            classes,
            fusion=self.fusion,
            head=self.head,
            hidden=self.hidden,
            logit_scale=self.encoder.logit_scale,
            tower=self._tower(),
            patches=patches,
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
    def _fused(self, classifier: FusedClassifier, inputs: Inputs, text_features: Tensor) -> Tensor:
        """Compute the mean of M over the views, batch by batch: V views of N images -> (N, D')."""
        return (
            torch.cat(
                [classifier.fuse(tower, patches, text_features) for tower, patches in inputs.batches(_BATCH)]
            )
            .unflatten(0, inputs.patches.shape[:2])
            .mean(dim=0)
        )

    @torch.no_grad()
    def _zero_shot(self, inputs: Inputs) -> Tensor:
        """Compute the mean of s I Tᵀ of the frozen towers over the views: V views of N images -> (N, K)."""
        adapted = (self.untrained_.adapt(tower, self.untrained_text_) for tower, _ in inputs.batches(_BATCH))
        logits = torch.cat([self.text_logits(image, text) for image, text in adapted])
        return logits.unflatten(0, inputs.patches.shape[:2]).mean(dim=0)

    def encode(self, inputs: Tensor) -> Tensor:
        """Fused features M: (N, ...) -> (N, D')."""
        return self._fused(self.classifier_, self._split(inputs[None]), self.text_features_)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, ...) -> logits (N, K) of the probe on M and of the head C."""
        split = self._split(inputs[None])
        fused = self._fused(self.classifier_, split, self.text_features_)
        probe, head = torch.from_numpy(self.probe_.logits(fused.numpy())), self.classifier_.head(fused)
        if self.trusts_text_:
            zero_shot = self._zero_shot(split)
            probe, head = zero_shot + probe, (zero_shot + head) / 2
        return {"probe": probe, "head": head}

    def slopes(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ (logit of the target - mean of the others) / ∂ inputs of the probe, (B, D + P).

        Only for frozen encoders, whose inputs are features; ``targets`` is (B,) int64.
        """
        with torch.enable_grad():
            features = inputs.detach().float().requires_grad_()
            image, patches = features.tensor_split([self.encoder.dim], dim=1)
            fused = self.classifier_.fuse(image, patches, self.text_features_)
            logits = fused.double() @ torch.from_numpy(self.probe_.coef).T
            if self.trusts_text_:
                logits = logits + self.text_logits(*self.untrained_.adapt(image, self.untrained_text_))
            chosen = logits.gather(1, targets[:, None])[:, 0]
            others = (logits.sum(dim=1) - chosen) / (logits.shape[1] - 1)
            (slopes,) = torch.autograd.grad((chosen - others).sum(), features)
        return slopes

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
        patches = len(state["classifier.patch_mean"])
        self.untrained_ = self._untrained(self.untrained_text_, patches).eval()
        self.classifier_ = self._untrained(self.text_features_, patches)
        self.classifier_.load_state_dict(with_prefix(state, "classifier."))
        self.classifier_.eval()
        return self
