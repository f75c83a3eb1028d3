"""BiomedCoOp (Koleilat et al., CVPR 2025, arXiv 2411.15232): CoOp's contexts, kept near an ensemble of texts.

The contexts minimise CE + λ₁ SCCM + λ₂ KDSP. With N texts per class, written by a language model and encoded
by the frozen text tower as E (K, N, D):

- SCCM, semantic consistency, is the mean squared difference between the learned text features and the
  classes' normalised mean texts.
- KDSP, knowledge distillation with selective prompting, is KL(teacher || student) / K. The teacher is
  zero-shot CLIP with the mean of the selected texts. The score of text n is the mean over the batch of max_k
  s f·E_kn; the text is selected if its score is within τ standard deviations of the mean score.

The published settings are M = 4 contexts that start at "a photo of a"; N = 50; SGD with a learning rate of
2.5e-3 and a cosine, after one epoch at 1e-5; 100 epochs; batches of 4; τ = 1.5. λ₁ and λ₂ are set by hand for
each data set, from 0.25 to 2; params.yaml has the code's defaults of 1.

The texts come from the setting ``texts``, which a study reads from a file. Without it, the prompts of the
class templates take their place. They say less than a language model's texts. With four of them or fewer, no
score can be beyond τ = 1.5, so all are selected: the method is then CoOp with zero-shot CLIP as its teacher.

Deviations from the public code: it divides the scores' distance from their median by the median distance and
standardises the result, which equals standardising the scores. If all scores are equal, its selection is not
defined; here it takes every text. Each step draws its views from a few cached views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.clip.prompt_learning import ContextTower, start_contexts, write_texts
from medfocus.learning.contexts import ContextMethod, train_sgd
from medfocus.learning.method import Support


def consistency(text_features: Tensor, ensemble: Tensor) -> Tensor:
    """SCCM: learned (K, D) and ensemble (K, N, D), all of length one -> scalar."""
    return functional.mse_loss(text_features, functional.normalize(ensemble.mean(dim=1), dim=-1))


def selected(scores: Tensor, tau: float) -> Tensor:
    """Return which of N texts have a score (N,) within τ standard deviations of the mean score: (N,) bool."""
    distance = scores - scores.mean()
    return distance.abs() <= tau * distance.square().sum().div(max(1, len(scores) - 1)).sqrt()


def teacher(features: Tensor, ensemble: Tensor, logit_scale: float, tau: float) -> Tensor:
    """Return the teacher's logits of a batch: features (B, D), ensemble (K, N, D) -> (B, K)."""
    each = logit_scale * torch.einsum("bd,knd->bnk", features, ensemble)
    chosen = selected(each.amax(dim=2).mean(dim=0), tau)  # (N,)
    means = functional.normalize(ensemble[:, chosen].mean(dim=1), dim=-1)  # (K, D)
    return logit_scale * features @ means.T


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KDSP: KL(teacher || student) / K, a mean over the batch; logits (B, K), (B, K) -> scalar."""
    log_teacher = teacher.log_softmax(dim=1)
    return (log_teacher.exp() * (log_teacher - student.log_softmax(dim=1))).mean()


@dataclass
class BiomedCoOp(ContextMethod):
    """Trains only the contexts, which all classes share."""

    learned: ClassVar[tuple[str, ...]] = ("text_features", "contexts")
    name: ClassVar[str] = "biomedcoop"
    texts: Mapping[str, Sequence[str]]  # class name -> its N texts; empty: the prompts of the templates
    consistency: float  # λ₁
    distillation: float  # λ₂
    tau: float  # τ
    contexts_: Tensor = field(init=False, repr=False)  # (M, W)
    text_features_: Tensor = field(init=False, repr=False)  # (K, D)

    def __post_init__(self) -> None:
        self.check()
        for name in ("consistency", "distillation"):
            if (weight := getattr(self, name)) < 0:
                raise ValueError(f"biomedcoop: {name} is {weight}. Use 0 or more.")
        if self.tau < 1:
            raise ValueError(f"biomedcoop: tau is {self.tau}. Use 1 or more: below, no text may be selected.")
        if not isinstance(self.texts, Mapping):
            raise ValueError(
                f"biomedcoop: texts is {self.texts!r}. Give a list of texts for each class, or {{}} for the "
                "prompts of the templates."
            )

    @property
    def note(self) -> str:
        """See ``Method.note``: the source of the texts."""
        return "texts: given" if self.texts else "texts: class templates"

    def ensemble(self, support: Support) -> Tensor:
        """Encode the texts of the classes: (K, N, D), each of length one.

        Raises ValueError if a class has no texts, or if the classes have different numbers of texts.
        """
        missing = [name for name in support.class_names if name not in self.texts]
        if self.texts and missing:
            raise ValueError(
                f"biomedcoop: texts has no texts for the class {missing[0]!r}. Name it as in text prompts; "
                f"texts has {', '.join(map(repr, self.texts))}."
            )
        texts = [self.texts[name] for name in support.class_names] if self.texts else support.prompts
        counts = {len(of_class) for of_class in texts}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"biomedcoop: the classes have {', '.join(map(str, sorted(counts))) or 'no'} texts. Give all "
                "the same number, because text n is selected or left out for all of them."
            )
        features = self.encoder.encode_texts([text for of_class in texts for text in of_class]).cpu()
        return features.unflatten(0, (len(texts), -1))

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train the contexts on frozen image features.

        Raises ValueError as ``ensemble``, ``write_texts`` and ``start_contexts`` do.
        """
        features, labels = support.inputs.float(), support.labels  # (V, N, D), (N,)
        texts = write_texts(self.name, self.encoder, support.class_names, self.contexts)
        ensemble, tower = self.ensemble(support), ContextTower(self.encoder, texts)
        contexts = nn.Parameter(start_contexts(self.name, self.encoder, self.contexts, self.start, generator))

        def accumulate(index: Tensor, view: Tensor) -> None:
            batch = features[view, index]  # (B, D)
            learnt = tower(contexts[None, None])[0]  # (K, D)
            logits = self.text_logits(batch, learnt)  # (B, K)
            zero_shot = teacher(batch, ensemble, self.encoder.logit_scale, self.tau)
            loss = functional.cross_entropy(logits, labels[index])
            loss = loss + self.consistency * consistency(learnt, ensemble)
            (loss + self.distillation * distillation(logits, zero_shot)).backward()

        train_sgd(
            [contexts],
            accumulate,
            len(labels),
            self.schedule_for(len(labels), len(texts.tokens)),
            views=len(features),
            generator=generator,
        )
        self.contexts_ = contexts.detach()
        with torch.no_grad():
            self.text_features_ = tower(self.contexts_[None, None])[0]
        return self

    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Inputs (N, D) -> logits (N, K)."""
        return {"text": self.text_logits(inputs.float(), self.text_features_)}
