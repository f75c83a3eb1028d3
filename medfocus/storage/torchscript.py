"""Read the tensors of a TorchScript archive without running anything in it.

``torch.jit.load`` compiles the archive's code and calls its ``__setstate__`` methods, which can write files.
An archive is a zip: ``data.pkl`` holds the modules with their attributes, and ``data/`` the bytes of tensors.
This module unpickles ``data.pkl`` with a handful of names, and never looks at ``code/``.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Object:
    """An object of any class of the archive, as its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip with code, which ``torch.save`` never writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the named parameters and buffers of an archive, on the CPU.

    Raises pickle.UnpicklingError for an archive that needs more than modules and tensors, and KeyError,
    RuntimeError or zipfile.BadZipFile for a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        [file] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(file) as content:
            module = _Unpickler(content, archive, file.removesuffix("data.pkl")).load()
    return dict(_named(module, ""))


def _named(module: object, prefix: str) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a module and of the modules in it, by the names of ``state_dict``."""
    if isinstance(module, torch.Tensor):
        return [(prefix.removesuffix("."), module)]
    if not isinstance(module, _Object):
        return []
    attributes = getattr(module, "attributes", {})
    return [pair for name, value in attributes.items() for pair in _named(value, f"{prefix}{name}.")]


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows modules as plain objects, and tensors."""

    def __init__(self, content: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(content)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """Return a harmless stand-in. What the archive does with it stays in this unpickler's objects."""
        if module.split(".")[0] == "__torch__":
            return type(name, (_Object,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _tensor(*arguments)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *_: OrderedDict()
        if module == "torch" and name in _DTYPES:
            return name
        if module == "torch.jit._pickle":  # lists of numbers and of tensors, which no state has
            return lambda *_: None
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return the storage ("storage", dtype, key, device, number of elements) as a flat tensor."""
        _, kind, key, _, count = pid
        dtype = _DTYPES[kind]
        content = bytearray(self._archive.read(f"{self._root}data/{key}"))
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype, count=count)


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    return storage.as_strided(size, stride, offset).clone()
