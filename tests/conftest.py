"""Fixtures of all tests: real images, Chromium, a tiny CLIP and a small project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHARED_DATA = Path(
    os.environ.get("MEDFOCUS_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real datasets; skip the test if it does not exist."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images at {SHARED_DATA}; set MEDFOCUS_SHARED_DATA to their folder")
    return SHARED_DATA


def run_forked(work: Callable[..., object], *arguments: object) -> None:
    """Run ``work`` in a forked process, then end it without the exit handlers of libraries."""
    work(*arguments)
    os._exit(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a running Chromium; skip the test, with a message, if Chromium is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip(f"Chromium is not installed: none of {', '.join(names)} is on the PATH")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def sets_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the tracking URI and the environment after a test that calls ``mlflow.set_tracking_uri``."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    yield
    mlflow.set_tracking_uri("")


class TinyTail(nn.Module):
    """Mean over tokens, then a linear map: the smallest tail of an image encoder."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) -> (B, D)."""
        return functional.normalize(self.projection(tokens.mean(dim=1)), dim=-1)


class TinyClip:
    """A tiny stand-in for CLIP with 8 features; its tokens are the mean colours of the four quadrants."""

    dim = 8
    logit_scale = 10.0
    key = "tiny"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._tail = TinyTail(3, self.dim)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) in [0, 1]."""
        return images.permute(0, 3, 1, 2).float() / 255

    def describe(self, views: Tensor, grid: int) -> Tensor:
        """(B, S, S, C) uint8 -> mean colours of ``grid`` x ``grid`` cells (B, 3 grid²)."""
        pixels = views[..., :3].permute(0, 3, 1, 2).float() / 255
        return functional.adaptive_avg_pool2d(pixels, grid).flatten(1)

    def trunk(self, pixels: Tensor, blocks: int) -> Tensor:
        """(B, 3, S, S) -> (B, 4, 3)."""
        return functional.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)

    def tail(self, blocks: int) -> nn.Module:
        """Return a trainable copy of the tail."""
        copy = TinyTail(3, self.dim)
        copy.load_state_dict(self._tail.state_dict())
        return copy

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 8)."""
        return self._tail(self.trunk(pixels, 1))


@pytest.fixture
def tiny_clip() -> TinyClip:
    """Return the tiny CLIP, the same in every test."""
    return TinyClip()


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the project to a temporary folder, with a study that takes seconds: one dataset of 39 images."""
    make_project(tmp_path)
    work_in(tmp_path, monkeypatch)
    return tmp_path


def make_project(folder: Path, segmenter: str = "otsu") -> None:
    """Copy the project to an empty folder; see ``project``."""
    for name in ("medfocus", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    local = shutil.ignore_patterns("cache", "tmp", "config.local")
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=local)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["study"] |= {
        "methods": {
            "pixels": ["none"],
            "clip-zero-shot": ["none"],
            "medfocusclip": ["none", "multiply", "shuffled"],
        },
        "percents": [50, 100],
        "seeds": [0, 1],
    }
    content["datasets"] = {"phantom-breast": content["datasets"]["phantom-breast"]}
    content["phantoms"] = {
        "breast_ultrasound": {"seed": 0, "train_per_class": 8, "test_per_class": 5, "size": 96}
    }
    content["masks"] |= {"segmenter": segmenter}
    content["report"] |= {"baseline": "pixels"}
    content["gate"] |= {"recall": {}, "calibration": 0.99}  # 15 test images are too few for the default gate
    content["methods"]["medfocusclip"] |= {"epochs": 5}
    (folder / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "."],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "start"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a project, without servers and with a Prefect profile of its own."""
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PREFECT_HOME", str(folder / ".prefect"))
    monkeypatch.chdir(folder)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty hub cache without network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache: Path, hub_id: str) -> Path:
    """Make the folder of a repository's files in the hub cache."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    files = repository / "snapshots" / "abc123"
    for folder in (repository / "refs", files):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("abc123")
    return files
