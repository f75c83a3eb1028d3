"""Checkpoints are found, loaded safely and identified by their content."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import save_file

from medfocus.storage import weights
from tests.conftest import snapshot

HUB_ID = "facebook/sam2.1-hiera-tiny"
FILE = "sam2.1_hiera_tiny.pt"
STATE = {
    "stem.weight": torch.arange(6.0).reshape(2, 3),
    "scale": torch.tensor(2.5),
    "steps": torch.tensor([7]),
}


class Touch:
    """A pickle that creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def put_in_hub_cache(cache: Path, hub_id: str, filename: str) -> Path:
    file = snapshot(cache, hub_id) / filename
    file.write_bytes(b"weights")
    return file


def resolve(name: str, filename: str | list[str] = FILE) -> Path:
    return weights.resolve(name, hub_id=HUB_ID, filename=filename, what="SAM2 (masks.checkpoint)")


def test_a_local_path_has_precedence_over_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    put_in_hub_cache(hub_cache, HUB_ID, FILE)
    local = tmp_path / "mine.pt"
    local.write_bytes(b"mine")
    assert resolve(str(local)) == local


def test_the_hub_cache_serves_without_a_network(hub_cache: Path) -> None:
    cached = put_in_hub_cache(hub_cache, HUB_ID, FILE)
    assert resolve("tiny") == cached
    assert resolve(FILE) == cached  # a file name of the hub is not a path


def test_the_preferred_of_several_hub_files_is_used(hub_cache: Path) -> None:
    second = put_in_hub_cache(hub_cache, HUB_ID, "model.bin")
    assert resolve("tiny", ["model.safetensors", "model.bin"]) == second
    first = put_in_hub_cache(hub_cache, HUB_ID, "model.safetensors")
    assert resolve("tiny", ["model.safetensors", "model.bin"]) == first


def test_the_hub_is_queried_last_for_each_file_name(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look(url: str) -> None:
        asked.append(url.rsplit("/", 1)[1])
        if asked[-1] == "model.safetensors":
            raise RemoteEntryNotFoundError("404", response=Mock())

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", look)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, name: str(tmp_path / name))
    assert resolve("tiny", ["model.safetensors", "model.bin"]) == tmp_path / "model.bin"
    assert asked == ["model.safetensors", "model.bin"]


def test_a_missing_file_without_network_gives_one_error_with_file_hub_and_cache(hub_cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        resolve("tiny")
    message = str(caught.value)
    assert message.startswith("SAM2 (masks.checkpoint): 'tiny' is not a local file, ")
    assert f"{FILE} of '{HUB_ID}' is not in the hub cache {hub_cache}" in message
    assert "and the download failed (OfflineModeIsEnabled: " in message
    assert "Give the path of a local file instead of 'tiny'" in message
    assert f"`hf download {HUB_ID} {FILE}`" in message


def test_a_mistyped_path_never_becomes_a_download(hub_cache: Path, tmp_path: Path) -> None:
    put_in_hub_cache(hub_cache, HUB_ID, FILE)
    with pytest.raises(
        FileNotFoundError, match=r"masks\.checkpoint\): the file '.*typo\.pt' does not exist\. Put"
    ):
        resolve(str(tmp_path / "typo.pt"))
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        weights.resolve(str(tmp_path), hub_id=None, filename=None, what="SAM2")


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_file_format_loads_the_same_tensors(tmp_path: Path, wrapper: str, prefix: str) -> None:
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in STATE.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "a.safetensors")
    assert weights.load(tmp_path / "a.pt").keys() == STATE.keys()
    assert (
        weights.digest(tmp_path / "a.pt")
        == weights.digest(tmp_path / "a.safetensors")
        == weights.digest(STATE)
    )


def test_a_digest_depends_on_name_shape_type_and_value_but_not_on_order() -> None:
    base = weights.digest(STATE)
    assert len(base) == 64
    assert weights.digest(dict(reversed(STATE.items()))) == base
    others = [
        {**STATE, "scale": torch.tensor(2.5000002)},
        {**STATE, "stem.weight": STATE["stem.weight"].reshape(3, 2)},
        {**STATE, "steps": STATE["steps"].to(torch.int32)},
        {"stem.weights" if name == "stem.weight" else name: tensor for name, tensor in STATE.items()},
    ]
    assert len({base, *map(weights.digest, others)}) == 5


def test_a_digest_reads_half_precision_and_transposed_tensors() -> None:
    half = {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}
    assert weights.digest(half) == weights.digest({"w": half["w"].T.contiguous().T})
    assert weights.digest(half) != weights.digest({"w": half["w"].half()})


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_its_code_never_runs(
    tmp_path: Path, zipped: bool, protocol: int
) -> None:
    trap, file = tmp_path / "ran", tmp_path / "evil.pt"
    if zipped:
        torch.save({"state_dict": {"w": Touch(trap)}}, file, pickle_protocol=protocol)
    else:
        file.write_bytes(pickle.dumps({"w": Touch(trap)}, protocol))
    with pytest.raises(ValueError, match=r"evil\.pt: (needs|is not a complete checkpoint)"):
        weights.load(file)
    assert not trap.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert trap.exists()  # the trap works, so ``load`` did not unpickle it


def test_the_error_of_a_refused_checkpoint_names_the_import_and_the_fix(tmp_path: Path) -> None:
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"needs posix\.system in addition to tensors.*as safetensors"):
        weights.load(tmp_path / "evil.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module\.pt: needs torch\.nn\.modules\.linear\.Linear in addition"):
        weights.load(tmp_path / "module.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kept", [0, 40, 300])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, kept: int) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    save_file(STATE, tmp_path / "a.safetensors")
    content = (tmp_path / name).read_bytes()
    assert len(content) > kept or name == "a.safetensors"
    (tmp_path / name).write_bytes(content[: min(kept, len(content) - 1)])
    with pytest.raises(
        ValueError, match=rf"{name}: is not a complete .* \(.*\)\. Copy or download it again\."
    ):
        weights.load(tmp_path / name)


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(
        ValueError, match=r"list\.pt: holds list, not named tensors\. Save a model's state_dict"
    ):
        weights.load(tmp_path / "list.pt")
    torch.save({"w": torch.zeros(2), "epoch": 3}, tmp_path / "loose.pt")
    with pytest.raises(
        ValueError, match=r"loose\.pt: the entry 'epoch' is int, not a tensor\. Save only the weights"
    ):
        weights.load(tmp_path / "loose.pt")
