"""Make text prompts from class names and a modality, and class embeddings from text prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# The last template of each modality is the paper's (arXiv 2501.03839).
TEMPLATES: dict[str, tuple[str, ...]] = {
    "chest_xray": (
        "a chest X-ray showing {c}",
        "a frontal chest radiograph of a patient with {c}",
        "an X-ray of the lungs with signs of {c}",
        "This is a photo of {c}",
    ),
    "brain_mri": (
        "a brain MRI of {c}",
        "a magnetic resonance image of the brain showing {c}",
        "an axial MRI slice of a brain with {c}",
        "This is a photo of {c}",
    ),
    "breast_ultrasound": (
        "a breast ultrasound of {c}",
        "an ultrasound image of the breast showing {c}",
        "a breast sonogram with {c}",
        "This is a photo of {c}",
    ),
    "chest_ct": (
        "a chest CT showing {c}",
        "an axial CT slice of the chest with {c}",
        "a computed tomography scan of the lungs of a patient with {c}",
        "This is a photo of {c}",
    ),
    "other": (
        "a medical image showing {c}",
        "a medical scan of a patient with {c}",
        "This is a photo of {c}",
    ),
}


class TextEncoder(Protocol):
    """The part of CLIP that ``class_embeddings`` needs."""

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Encode N texts as features (N, D), each of length one."""
        ...


def text_prompts(
    class_names: Sequence[str], modality: str, templates: Sequence[str] | None = None
) -> list[list[str]]:
    """Return text prompts (K, T) of K class names: every template with the class name in place of "{c}".

    ``templates`` replace the templates of ``modality`` unless they are None or empty. Underscores in a class
    name become spaces.

    Raises ValueError for an unknown modality, a template without "{c}" or an empty class name.
    """
    if modality not in TEMPLATES:
        raise ValueError(f"modality '{modality}' has no text prompts. Use one of {', '.join(TEMPLATES)}.")
    templates = templates or TEMPLATES[modality]
    for template in templates:
        if "{c}" not in template:
            raise ValueError(
                f"the template '{template}' has no {{c}}, so its prompt would be the same for every class. "
                "Write {c} in place of the class name."
            )
    names = [" ".join(name.replace("_", " ").split()) for name in class_names]
    if not all(names):
        raise ValueError(f"class {names.index('')} has an empty name. Give it a name.")
    return [[template.replace("{c}", name) for template in templates] for name in names]


def class_embeddings(encoder: TextEncoder, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Encode text prompts (K, T) as class embeddings (K, D): normalise, mean over templates, normalise.

    The number of templates T may differ between classes. Source: Radford et al., "Learning Transferable
    Visual Models From Natural Language Supervision", section 3.1.4.
    """
    import torch
    from torch.nn.functional import normalize

    features = encoder.encode_texts([prompt for ensemble in prompts for prompt in ensemble])  # (sum T, D)
    ensembles = normalize(features, dim=-1).split([len(ensemble) for ensemble in prompts])
    return normalize(torch.stack([ensemble.mean(dim=0) for ensemble in ensembles]), dim=-1)  # (K, D)
