"""Find, load and identify weights. All checkpoints are loaded here."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".tar")


def resolve(name: str, *, hub_id: str | None, filename: str | Sequence[str] | None, what: str) -> Path:
    """Find the weights file ``name`` as a local path, else in the local hub cache, else on the hub.

    ``filename`` is the name of the file in the hub repository ``hub_id``, or several in order of preference.
    ``what`` names the purpose of the weights at the start of an error message. Best is the setting that takes
    their path, such as "params.yaml: masks.checkpoint". A name spelt as a path is never looked up
    on the hub, so that a typing error does not fetch other weights.

    Raises FileNotFoundError, which names the file, the hub id and the place to put the file.
    """
    local = Path(name).expanduser()
    if local.is_file():
        return local
    names = [filename] if isinstance(filename, str) else list(filename or [])
    if hub_id is None or not names or (name not in names and _is_path(name)):
        if local.is_dir():
            raise FileNotFoundError(f"{what}: '{name}' is a folder, not a file. Give the path of a file.")
        raise FileNotFoundError(
            f"{what}: the file '{name}' does not exist. Put it there or give another path."
        )

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
            # Fail at once: the download would try an unreachable hub six times, for 24 seconds.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, candidate))
            return Path(huggingface_hub.hf_hub_download(hub_id, candidate))
        except RemoteEntryNotFoundError as error:
            reason = error  # the repository has no such file; try the next name
        except Exception as error:  # no network, repository or permission; other names would fail too
            reason = error
            break
    cache = constants.HF_HUB_CACHE
    raise FileNotFoundError(
        f"{what}: '{name}' is not a local file, {' or '.join(names)} of '{hub_id}' is not in the hub cache "
        f"{cache}, and the download failed ({_reason(reason)}). Give the path of a local file instead of "
        f"'{name}', or run `hf download {hub_id} {names[0]}` on a machine with network access and copy its "
        f"hub cache to {cache}."
    ) from reason


def load(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of safetensors, a pickle of tensors or a TorchScript archive to the CPU.

    Weights under "state_dict" or "model" are unwrapped, and the prefix "module." of data-parallel training is
    removed. No code in the file is ever run.

    Raises ValueError if the file is damaged, holds anything other than named tensors, or is a pickle that
    needs more than ``torch.load(weights_only=True)`` allows.
    """
    if path.suffix == ".npz":
        raise ValueError(
            f"{path}: is an archive of NumPy. Use the same model's weights as safetensors or .pt."
        )
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
                f"{path}: the entry {key!r} is {type(value).__name__}, not a tensor. Save only the weights, "
                'or save them under "state_dict" or "model".'
            )
        state[key] = value.detach()
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def digest(weights: Path | Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 hex of the names, types, shapes and bytes of all tensors in a file or state dict.

    Equal tensors give the same digest in any file format and in any order.
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
            f"{path}: is not a complete safetensors file ({error}). Copy or download it again."
        ) from error


def _unpickle(path: Path) -> object:
    import torch

    from medfocus.storage import torchscript

    try:
        if torchscript.is_torchscript(path):
            return torchscript.tensors(path)
        with warnings.catch_warnings():
            # torch reads a newer protocol, or raises an error that is handled below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_DAMAGED) as error:
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: needs {needed[1]} in addition to tensors, so opening it could run any "
                "code. If you trust its source, save its state_dict() as safetensors."
            ) from error
        reason = "not a pickle of tensors" if isinstance(error, pickle.UnpicklingError) else _reason(error)
        raise ValueError(
            f"{path}: is not a complete checkpoint ({reason}). Copy or download it again."
        ) from error
