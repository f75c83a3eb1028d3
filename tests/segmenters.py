"""Images, regions and a segmenter for the tests of masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from scipy import ndimage

from medfocus.datasets.records import Record
from medfocus.masks import candidates
from medfocus.masks.segmenter import Mask
from medfocus.masks.settings import OtsuSettings


def disc(y: float, x: float, radius: float, size: int = 64) -> np.ndarray:
    """Return a disc (size, size) bool; centre and radius are shares of the side."""
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size
    return np.hypot(rows - y, columns - x) < radius


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    """Return smooth random colours (h, w, 3) uint8."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(h, w, 3)), (h / 9, w / 9, 0))
    return ((field - field.min()) / np.ptp(field) * 255).astype(np.uint8)


def awkward_images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    flat = np.full((50, 40, 3), 90, dtype=np.uint8)
    grey = rng.integers(0, 256, (90, 60, 1), dtype=np.uint8).repeat(3, 2)
    others = [(8, 8), (1, 1), (400, 20), (15, 300), (33, 47)]
    read_only = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    read_only.flags.writeable = False
    return [flat, grey, read_only, *(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in others)]


def assert_sound(masks: Sequence[Mask], images: Sequence[np.ndarray]) -> None:
    assert len(masks) == len(images)
    for mask, image in zip(masks, images, strict=True):
        assert mask.region.shape == image.shape[:2]
        assert mask.region.dtype == bool
        assert mask.region.any()
        assert 0 <= mask.score <= 1
        assert (mask.status == "identity") == (mask.score == 0)
        assert mask.status != "identity" or mask.region.all()


def amplify(model: torch.nn.Module) -> None:
    """Scale up the mask logits of random weights, so that masks have edges and are stable."""
    with torch.no_grad():
        for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:  # pyright: ignore
            mlp.layers[-1].weight.mul_(100)
            mlp.layers[-1].bias.mul_(100)


class Counting:
    """A segmenter of the brighter half that records the size of its batches."""

    key, settings, sam2 = "counting", OtsuSettings(), None

    def __init__(self, fail_at: int | None = None) -> None:
        self.batches: list[int] = []
        self.fail_at = fail_at

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        if len(self.batches) == self.fail_at:
            raise RuntimeError("the machine is switched off")
        self.batches.append(len(images))
        return [Mask(image[:, :, 0] > 127, 0.5, "chosen") for image in images]


def write_images(folder: Path, count: int, size: int = 24) -> list[tuple[Record, Path]]:
    """Write different images as PNG, labelled "even" and "odd" in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for i in range(count):
        path = folder / f"{i:04d}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size + 5, 3), dtype=np.uint8)).save(
            path
        )
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        label = "odd" if i % 2 else "even"
        images.append((Record(path.name, sha, size + 5, size, "RGB", label, "train", ""), path))
    return images


def hiera(folder: Path) -> str:
    """Write the configuration of a SAM2 with a small Hiera for 128 px, and return its path."""
    config = yaml.safe_load((Path(candidates.__file__).parents[1] / "configs/sam2_pocket.yaml").read_text())
    config["model"]["image_size"] = 128
    config["model"]["image_encoder"]["trunk"] = {
        "_target_": "sam2.modeling.backbones.hieradet.Hiera",
        "embed_dim": 32, "num_heads": 1, "stages": [1, 1, 3, 1], "global_att_blocks": [3, 4],
        "window_spec": [8, 4, 8, 4], "window_pos_embed_bkg_spatial_size": [7, 7],
    }  # fmt: skip
    config["model"]["image_encoder"]["neck"]["backbone_channel_list"] = [256, 128, 64, 32]
    (folder / "hiera.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "hiera.yaml")
