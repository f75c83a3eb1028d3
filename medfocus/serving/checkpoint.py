"""Save and load a fitted method: one safetensors file, its settings and facts in the header."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medfocus.methods import METHODS, Method

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself beside its tensors."""

    method: str  # a key of METHODS
    settings: dict[str, Any]  # the method's hyperparameters, without the encoder
    classes: tuple[str, ...]  # in the order of the logits
    focus: str
    encoder_key: str  # of the CLIP towers it was fitted on
    validation_correct: int  # out-of-fold predictions inside the support that were right ...
    validation_count: int  # ... of so many; 0 where no fold could be made
    facts: dict[str, Any]  # the cell: data set, support, seed, n_train, ...


def save(method: Method, header: Header, path: Path) -> None:
    """Write ``path`` atomically; what stands there before is replaced whole."""
    tensors = {name: value.detach().contiguous().clone() for name, value in method.state().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    # One metadata key: safetensors writes several in no fixed order, and the bytes must be.
    try:
        save_file(tensors, beside, metadata={"medfocus": json.dumps(asdict(header), sort_keys=True)})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)  # of a disk that is full every byte counts


def read_header(path: Path) -> Header:
    """The header alone, without its tensors. Raises ValueError where the file is not a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {})["medfocus"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a MedFocusCLIP checkpoint ({error}); delete it and run the finetune stage again."
        ) from error
    fields = json.loads(content)
    return Header(**{**fields, "classes": tuple(fields["classes"])})


def load(path: Path, encoder: ClipEncoder) -> tuple[Method, Header]:
    """The fitted method on ``encoder``, and its header.

    Raises ValueError where the file is not a checkpoint or was fitted on other CLIP weights.
    """
    header = read_header(path)
    if header.encoder_key != encoder.key:
        raise ValueError(
            f"{path} was fitted on CLIP weights {header.encoder_key[:12]}, but these are {encoder.key[:12]}; "
            "load the weights it was fitted on (params.yaml: clip) or run the finetune stage again."
        )
    with safe_open(path, framework="pt") as file:
        state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in header.settings.items()}
    return METHODS[header.method](encoder, **settings).load(state), header
