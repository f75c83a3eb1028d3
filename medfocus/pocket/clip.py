"""Training of the pocket CLIP on phantoms and captions.

The network is open_clip's, in the configuration ``configs/clip_pocket.json``. The loss is CLIP's (arXiv
2103.00020), except that a caption is a positive for every image of the batch for which it is true.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import Dataset

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import TEMPLATES
from medfocus.focus.modes import crop_window
from medfocus.focus.view import view
from medfocus.images.geometry import Frame
from medfocus.pocket.loop import Settings, train_and_write
from medfocus.pocket.pool import Drawn, Pool

FIELDS = ("modality", "finding", "region", "side", "size", "sequence")  # facts that a caption may name
SHARES = {"region": 0.4, "side": 0.3, "size": 0.4, "sequence": 0.3}  # probability that a caption names a fact
FEATHER = 0.01
# Probability of each visual prompt. The paper's method uses "multiply".
FOCUSED = {"multiply": 0.25, "crop": 0.25, "overlay": 0.04, "contour": 0.04, "blur": 0.04}
ANATOMY = {  # region -> channel of the outline head
    "lesion": 0,
    "left lung": 1,
    "right lung": 1,
    "heart": 2,
    "brain": 3,
    "ventricles": 4,
    "cisterns": 4,
}
_OUTLINED = 5  # channels of the outline head
_SWAPPED = {"left": "right", "right": "left"}


@dataclass(frozen=True, eq=False)
class Batch:
    """B images with a caption each, and their facts."""

    views: Tensor  # (B, S, S, 3) uint8
    tokens: Tensor  # (B, context) int64
    facts: Tensor  # (B, F) int64: hashes of the image's facts, by FIELDS; -1 for none
    named: Tensor  # (B, F) int64: likewise for the facts that the caption names
    outlines: Tensor  # (B, 5, G, G) float32: the share of each patch inside lesion and anatomy

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Batches(Dataset[Batch]):
    """The batches of a training. Seed and index determine a batch, in every process."""

    def __init__(self, pool: Pool, seed: int, batch_size: int, encoder: ClipEncoder) -> None:
        self.pool, self.seed, self.batch_size = pool, seed, batch_size
        self.size, self.tokenizer = encoder.image_size, encoder.tokenizer
        self.grid: int = encoder.model.visual.grid_size[0]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue, reportAssignmentType]

    def __getitem__(self, index: int) -> Batch:
        """Make the views and captions of ``batch_size`` images."""
        views, captions, facts, named, outlines = [], [], [], [], []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = np.random.default_rng([self.seed, 1, number])
            drawn = self.pool[self.pool.order(self.seed, number)]
            frame = framed(rng, mirror=drawn.facts.modality != "chest_xray")
            image, outline = show(drawn, frame, rng, self.size, self.grid)
            true = truths(drawn, frame.mirrored)
            named_facts, text = caption(true, rng)
            views.append(image)
            outlines.append(outline)
            captions.append(text)
            facts.append([_number(true.get(name)) for name in FIELDS])
            named.append([_number(named_facts.get(name)) for name in FIELDS])
        return Batch(
            torch.from_numpy(np.stack(views)),
            self.tokenizer(captions),
            torch.tensor(facts),
            torch.tensor(named),
            torch.from_numpy(np.stack(outlines)),
        )


def truths(drawn: Drawn, mirrored: bool) -> dict[str, str]:
    """Return the facts of an image, by FIELDS, with left and right exchanged if it is mirrored."""
    findings = drawn.facts.findings
    known = {"modality": drawn.facts.modality, "finding": drawn.facts.label}
    known |= {name: findings[name] for name in FIELDS[2:] if name in findings}
    if mirrored:
        for name in ("region", "side"):
            words = known.get(name, "").split()
            if words:
                known[name] = " ".join(_SWAPPED.get(word, word) for word in words)
    return known


def caption(true: Mapping[str, str], rng: np.random.Generator) -> tuple[dict[str, str], str]:
    """Write a sentence with modality, finding and some other facts; return these facts and the sentence."""
    named = {name: value for name, value in true.items() if name not in SHARES or rng.random() < SHARES[name]}
    phrase = f"{named['size']} {named['finding']}" if "size" in named else named["finding"]
    if "region" in named:
        phrase += f" in the {named['region']}"
    if "side" in named:
        phrase += " in the middle" if named["side"] == "middle" else f" on the {named['side']} side"
    if "sequence" in named:
        phrase += f", {named['sequence']}"
    template = str(rng.choice(TEMPLATES[true["modality"]]))
    return named, template.replace("{c}", phrase)


class Crop(NamedTuple):
    """The visible part of an image, in shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool


def cut(plane: np.ndarray, crop: Crop) -> np.ndarray:
    """Cut a crop out of an image (H, W, 3) or a mask (H, W), and mirror it if the crop is mirrored."""
    height, width = plane.shape[:2]
    top, left = round(crop.top * height), round(crop.left * width)
    rows = slice(top, max(top + 1, round(crop.bottom * height)))
    columns = slice(left, max(left + 1, round(crop.right * width)))
    return np.ascontiguousarray(plane[rows, columns][:, :: -1 if crop.mirrored else 1])


def show(
    drawn: Drawn, frame: Crop, rng: np.random.Generator, size: int, grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a view (S, S, 3) uint8, often with a visual prompt, and its outlines (5, G, G) float32."""
    image = np.repeat(toned(drawn.image, rng)[..., None], 3, 2)
    mode = str(rng.choice(["none", *FOCUSED], p=[1 - sum(FOCUSED.values()), *FOCUSED.values()]))
    mask = None if mode == "none" else attended(drawn, rng)
    # ``view`` would reject a frame that halves the mask, so cut the image here.
    image, regions = cut(image, frame), [cut(region, frame) for region in drawn.regions]
    mask = None if mask is None else cut(mask, frame)
    if mask is None or not mask.any():
        mode = "none"
    elif mode == "multiply":
        regions = [region & mask for region in regions]
    elif mode == "crop":
        regions = [region[crop_window(mask)] for region in regions]

    outlines = np.zeros((_OUTLINED, grid, grid), np.float32)
    for name, region in zip(drawn.facts.regions, regions, strict=True):
        part = Image.fromarray(Frame(size).mask(region).astype(np.uint8) * np.uint8(255))
        outlines[ANATOMY[name]] += (
            np.asarray(part.resize((grid, grid), Image.Resampling.BOX), np.float32) / 255
        )
    return view(image, mask, focus=mode, frame=Frame(size), feather=FEATHER), outlines.clip(0, 1)


def toned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary exposure, contrast, sharpness and grain of an image (S, S) uint8."""
    if rng.random() < 0.3:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6))))
    tone = (image.astype(np.float32) / 255) ** np.float32(np.exp(rng.normal(0, 0.35)))
    tone = (tone - 0.5) * np.float32(np.exp(rng.normal(0, 0.25))) + np.float32(0.5 + rng.normal(0, 0.08))
    tone = tone + np.float32(rng.uniform(0, 0.03)) * rng.standard_normal(tone.shape, np.float32)
    return (tone.clip(0, 1) * 255).astype(np.uint8)


def attended(drawn: Drawn, rng: np.random.Generator) -> np.ndarray:
    """Draw a rough mask (S, S) bool, such as an unprompted segmenter gives.

    If the image has a lesion, the mask is the lesion with probability 0.75. Otherwise the mask is anatomy or
    an ellipse anywhere.
    """
    size = len(drawn.image)
    anatomy = [region for region in drawn.regions[1:] if region.any()]
    if drawn.regions[0].any() and rng.random() < 0.75:
        region = drawn.regions[0]
    elif anatomy and rng.random() < 0.6:
        region = np.logical_or.reduce(anatomy) if rng.random() < 0.5 else anatomy[rng.integers(len(anatomy))]
    else:
        y, x = np.mgrid[:size, :size] / size
        (cx, cy), (rx, ry) = rng.uniform(0.2, 0.8, 2), rng.uniform(0.06, 0.25, 2)
        region = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
    grown = Image.fromarray(region.astype(np.uint8) * np.uint8(255))
    width = size // int(rng.integers(8, 40))
    grown = grown.resize((width, width), Image.Resampling.BOX).resize((size, size), Image.Resampling.BICUBIC)
    mask = np.asarray(grown) > rng.uniform(50, 150)
    return mask if mask.any() else region


def framed(rng: np.random.Generator, *, mirror: bool) -> Crop:
    """Draw a crop that need not be square, because films have many shapes."""
    width = height = 1.0 if rng.random() < 0.4 else rng.uniform(0.75, 1.0)
    if rng.random() < 0.4:
        height = rng.uniform(0.75, 1.0)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return Crop(left, top, left + width, top + height, bool(mirror and rng.random() < 0.5))


def _number(value: str | None) -> int:
    """Hash a word to a number that is the same on every machine; return -1 for None."""
    return -1 if value is None else zlib.crc32(value.encode())


def positives(facts: Tensor, named: Tensor) -> Tensor:
    """Return which caption is true for which image: facts (B, F), named (C, F) -> (B, C) bool."""
    return ((named[None] == facts[:, None]) | (named[None] < 0)).all(2)


def caption_loss(images: Tensor, texts: Tensor, true: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the mean cross-entropy of both directions, with targets spread over all positives.

    images (B, D) and texts (C, D) are unit vectors; true (B, C) bool has a True in each row and column.
    """
    logits = logit_scale * images @ texts.T  # (B, C)
    share = true.to(logits.dtype)
    i2t = F.cross_entropy(logits, share / share.sum(1, keepdim=True))
    t2i = F.cross_entropy(logits.T, (share / share.sum(0, keepdim=True)).T)
    return (i2t + t2i) / 2


class Pupil(nn.Module):
    """The CLIP in training, with a head that predicts lesion and anatomy by patch; the head is not kept."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.clip.visual.output_tokens = True
        self.outline = nn.Linear(clip.visual.ln_post.normalized_shape[0], _OUTLINED)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode pixels (B, 3, S, S) and tokens (B, n): images, texts (B, D), outlines (B, 5, G, G)."""
        pooled, patches = self.clip.visual(pixels)  # (B, D), (B, G·G, W)
        grid = self.clip.visual.grid_size
        outlines = self.outline(patches).transpose(1, 2).unflatten(2, grid)
        return F.normalize(pooled, dim=-1), self.clip.encode_text(tokens, normalize=True), outlines


def loss(pupil: Pupil, encoder: ClipEncoder, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return a batch's loss, its two parts, and the share of images with a true caption as the best."""
    images, texts, outlines = pupil(encoder.preprocess(batch.views), batch.tokens)
    true = positives(batch.facts, batch.named)
    captions = caption_loss(images, texts, true, pupil.clip.logit_scale.exp())
    outline = F.binary_cross_entropy_with_logits(outlines, batch.outlines)
    best = (images @ texts.T).argmax(1, keepdim=True)
    watched = {
        "captions": float(captions.detach()),
        "outlines": float(outline.detach()),
        "true": float(true.gather(1, best).float().mean()),
    }
    return captions + 5 * outline, watched


def train(
    pool: Pool,
    seed: int,
    out: Path,
    *,
    steps: int,
    batch_size: int = 96,
    lr: float = 1e-3,
    warmup: int = 150,
    weight_decay: float = 0.05,
    workers: int = 0,
    device: str = "cpu",
    line: int = 0,
) -> None:
    """Train from random weights and write the model to ``out`` as safetensors, float16.

    Raises ValueError if an interrupted training has other settings; see ``loop.train_and_write``.
    """
    encoder = build_clip("pocket", f"random:{seed}", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pupil = Pupil(encoder.model.train().requires_grad_(True)).to(device)

    def finished() -> Mapping[str, Tensor]:
        with torch.no_grad():
            pupil.clip.logit_scale.clamp_(max=np.log(100))
        return pupil.clip.state_dict()

    train_and_write(
        "pocket CLIP",
        out,
        Settings(seed, len(pool), steps, batch_size, lr, warmup, weight_decay, clip=1.0),
        pool.name,
        pupil,
        dict(pupil.named_parameters()),
        Batches(pool, seed, batch_size, encoder),
        lambda batch: loss(pupil, encoder, batch.to(device)),
        finished,
        workers=workers,
        line=line,
    )
