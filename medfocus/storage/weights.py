"""Weights: names become files, files become tensors, tensors become keys. The one door for checkpoints."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".tar")


def resolve(name: str, *, hub_id: str | None, filename: str | Sequence[str] | None, what: str) -> Path:
    """Find the file that ``name`` stands for: a local path, the local hub cache, the hub, in this order.

    ``filename`` is the file's name in the hub repository ``hub_id``, or several in order of preference.
    ``what`` says in the user's words what the weights are for and opens the error, best with the setting
    that takes a path: "params.yaml: masks.checkpoint". A name that is spelt as a path never falls through to
    the hub, so a typing error does not fetch other weights.

    Raises FileNotFoundError when the file is nowhere, naming the file, the hub id and where to put it.
    """
    local = Path(name).expanduser()
    if local.is_file():
        return local
    names = [filename] if isinstance(filename, str) else list(filename or [])
    if hub_id is None or not names or (name not in names and _is_path(name)):
        fault = "is a folder, not a file" if local.is_dir() else "does not exist"
        raise FileNotFoundError(f"{what}: the file '{name}' {fault}. Put it there or give another path.")

    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for candidate in names:
        cached = huggingface_hub.try_to_load_from_cache(hub_id, candidate)
        if isinstance(cached, str):
            return Path(cached)
    reason: Exception | None = None
    for candidate in names:
        try:
            # Without this look the download tries an unreachable hub six times, for 24 seconds.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, candidate))
            return Path(huggingface_hub.hf_hub_download(hub_id, candidate))
        except RemoteEntryNotFoundError as error:
            reason = error  # the hub answers, but this repository has no such file: try the next name
        except Exception as error:  # no route, no such repository, no right to it: the next fares no better
            reason = error
            break
    cache = constants.HF_HUB_CACHE
    raise FileNotFoundError(
        f"{what}: '{name}' is no local file, {' or '.join(names)} of the hub's '{hub_id}' is not in {cache}, "
        f"and the download failed ({_reason(reason)}). Put the file anywhere and give its path in place of "
        f"'{name}', or run `hf download {hub_id} {names[0]}` where there is a network and copy its hub cache "
        f"to {cache}."
    ) from reason


def load(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors on the CPU, out of safetensors or a pickle of nothing but tensors.

    A checkpoint that keeps its weights under "state_dict" or "model" is unwrapped, and the "module." that
    data-parallel training puts before every name is dropped. No code of the file is ever run.

    Raises ValueError when the file is damaged, holds anything but named tensors, or is a pickle that asks for
    more than ``torch.load(weights_only=True)`` allows.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{path}: holds {type(content).__name__}, not named tensors. Save a model's state_dict()."
        )

    import torch

    state: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: the entry {key!r} is {type(value).__name__}, not a tensor. Save the weights alone, "
                'or under "state_dict" or "model".'
            )
        state[key] = value.detach()
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def digest(weights: Path | Mapping[str, torch.Tensor]) -> str:
    """Name weights by their content: sha256 (hex) over every tensor's name, type, shape and bytes.

    The same tensors have the same digest in every file format and in every order. ``weights`` is a file or
    a state dict.
    """
    import torch

    state = load(weights) if isinstance(weights, Path) else weights
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or "\\" in name or Path(name).suffix in CHECKPOINT_SUFFIXES


def _reason(error: Exception | None) -> str:
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}). Copy or download it again."
        ) from error


def _unpickle(path: Path) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # Newer pickle protocols are read just as well, or refused below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        wanted = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if wanted:
            raise ValueError(
                f"{path}: asks for {wanted[1] or wanted[2]}, which is more than tensors. Such a file can run "
                "any code when it is opened, so it was refused. Where you trust its source, save its "
                "state_dict() as safetensors."
            ) from error
        reason = "no pickle of tensors" if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise ValueError(f"{path}: not a whole checkpoint ({reason}). Copy or download it again.") from error
