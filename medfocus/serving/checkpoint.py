"""Save and load a fitted method as one safetensors file, with settings and facts in its header."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medfocus.learning.calibration import Calibration
from medfocus.learning.method import Method
from medfocus.methods import METHODS
from medfocus.storage import atomic

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


@dataclass(frozen=True)
class Header:
    """The metadata of a checkpoint."""

    method: str  # a key of METHODS
    settings: dict[str, Any]  # the method's hyperparameters, without the encoder
    classes: tuple[str, ...]  # in the order of the logits
    focus: str
    encoder_key: str  # of the CLIP that the method was fitted on
    validation_correct: int  # correct out-of-fold predictions inside the support
    validation_count: int  # all out-of-fold predictions; 0 if the support has too few images for folds
    facts: dict[str, Any]  # about the cell: data set, support, seed, n_train, ...
    calibration: Calibration = field(default_factory=Calibration)  # of the main classifier


def save(method: Method, header: Header, path: Path) -> None:
    """Write a checkpoint atomically, and replace any file at ``path``."""
    tensors = {name: value.detach().contiguous().clone() for name, value in method.state().items()}
    # One metadata key, because safetensors writes several in a random order.
    with atomic.new_file(path) as file:
        save_file(tensors, file, metadata={"medfocus": json.dumps(asdict(header), sort_keys=True)})


def read_header(path: Path) -> Header:
    """Read the header without the tensors. Raises ValueError if the file is not a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {})["medfocus"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a MedFocusCLIP checkpoint ({error}). Delete it and run the finetune stage again."
        ) from error
    fields = json.loads(content)
    calibration = Calibration(**fields["calibration"])
    return Header(**{**fields, "classes": tuple(fields["classes"]), "calibration": calibration})


def load(path: Path, encoder: ClipEncoder) -> tuple[Method, Header]:
    """Load a fitted method on ``encoder``, and its header.

    Raises ValueError if the file is not a checkpoint, or was fitted on other CLIP weights or by a version
    with other hyperparameters.
    """
    header = read_header(path)
    if header.encoder_key != encoder.key:
        raise ValueError(
            f"{path} was fitted on CLIP weights {header.encoder_key[:12]}, but the encoder has "
            f"{encoder.key[:12]}. Load the weights of the fit (params.yaml: clip) or run finetune again."
        )
    with safe_open(path, framework="pt") as file:
        state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header.settings.items()}
    try:
        method = METHODS[header.method](encoder, **settings)
    except TypeError as error:
        raise ValueError(f"{path} is of another version of medfocus: {error}. Run finetune again.") from error
    return method.load(state), header
