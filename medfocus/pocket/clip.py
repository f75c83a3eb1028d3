"""Training of the pocket CLIP: a text tower and a projection for a locked image tower.

The network is open_clip's, in the configuration ``configs/clip_pocket.json``. Its image trunk has seen
natural images (``medfocus.storage.imagenet``) and stays as it is, as in LiT (arXiv 2111.07991). The trunk
therefore encodes every view of a phantom once, and the training reads these features. The loss is CLIP's
(arXiv 2103.00020), except that a caption is a positive for every image of the batch for which it is true.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import TEMPLATES
from medfocus.focus.augment import Augmentation, augmentation
from medfocus.focus.view import view
from medfocus.pocket.loop import Settings, train_and_write
from medfocus.pocket.pool import SHARD, Drawn, Pool
from medfocus.storage import atomic
from medfocus.storage.imagenet import imagenet_state

FIELDS = ("modality", "finding", "region", "side", "size", "sequence")  # facts that a caption may name
SHARES = {"region": 0.4, "side": 0.3, "size": 0.4, "sequence": 0.3}  # probability that a caption names a fact
FEATHER = 0.01
# Probability of each visual prompt. The paper's method uses "multiply".
FOCUSED = {"multiply": 0.25, "crop": 0.25, "overlay": 0.04, "contour": 0.04, "blur": 0.04}
VIEWS = 2  # of each phantom
_BATCH = 32  # images that the trunk encodes at once
_SWAPPED = {"left": "right", "right": "left"}


@dataclass(frozen=True, eq=False)
class Batch:
    """B views with a caption each, and their facts."""

    features: Tensor  # (B, W) float32, pooled by the locked trunk
    tokens: Tensor  # (B, n) int64, without padding that all captions share
    facts: Tensor  # (B, F) int64: hashes of the image's facts, by FIELDS; -1 for none
    named: Tensor  # (B, F) int64: likewise for the facts that the caption names

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Batches(Dataset[Batch]):
    """The batches of a training. Seed and index determine a batch, in every process."""

    def __init__(self, pool: Pool, seed: int, batch_size: int, encoder: ClipEncoder) -> None:
        """Encode the views of all images of the pool that are not on disk yet."""
        self.pool, self.seed, self.batch_size = pool, seed, batch_size
        self.tokenizer = encoder.tokenizer
        shards = tqdm(pool.shards, desc="views for clip", unit="shard")
        self.features = [encoded_views(pool, seed, numbers, encoder) for numbers in shards]

    def __getitem__(self, index: int) -> Batch:
        """Read a view and write a caption of ``batch_size`` images."""
        features, captions, facts, named = [], [], [], []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            rng = np.random.default_rng([self.seed, 1, number])
            image, shown = self.pool.order(self.seed, number), int(rng.integers(VIEWS))
            drawn = self.pool[image]
            true = truths(drawn, change_of(drawn, self.seed, image, shown).mirrored)
            named_facts, text = caption(true, rng)
            shard, row = divmod(image, len(self.pool.shards[0]))
            features.append(self.features[shard][row, shown])
            captions.append(text)
            facts.append([_number(true.get(name)) for name in FIELDS])
            named.append([_number(named_facts.get(name)) for name in FIELDS])
        tokens = self.tokenizer(captions)
        length = int((tokens != 0).sum(1).max())
        return Batch(
            torch.from_numpy(np.stack(features)).float(),
            tokens[:, :length],
            torch.tensor(facts),
            torch.tensor(named),
        )


def encoded_views(pool: Pool, seed: int, numbers: range, encoder: ClipEncoder) -> np.ndarray:
    """Encode the views of a shard's images by the trunk, once: (len(numbers), VIEWS, W) float16 on disk."""
    file = pool.folder / f"{numbers.start // SHARD:03d}.trunk.npy"
    if not file.is_file():
        rows: list[np.ndarray] = []
        visual: Any = encoder.model.visual
        for start in range(0, len(numbers), _BATCH):
            part = numbers[start : start + _BATCH]
            views = [
                show(pool[number], seed, number, shown, encoder) for number in part for shown in range(VIEWS)
            ]
            with torch.inference_mode():
                rows.append(visual.trunk(encoder.preprocess(np.stack(views))).half().cpu().numpy())
        with atomic.new_file(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.concatenate(rows).reshape(len(numbers), VIEWS, -1))
    return np.load(file, mmap_mode="r", allow_pickle=False)


def change_of(drawn: Drawn, seed: int, number: int, shown: int) -> Augmentation:
    """Return the augmentation of a view; chest films are never mirrored."""
    name = f"{seed:08x}{number:08x}"
    return augmentation(name, 1 + shown, mirror=drawn.facts.modality != "chest_xray")


def show(drawn: Drawn, seed: int, number: int, shown: int, encoder: ClipEncoder) -> np.ndarray:
    """Return a view (S, S, 3) uint8 of a phantom, often with a visual prompt."""
    rng = np.random.default_rng([seed, 2, number, shown])
    image = np.repeat(toned(drawn.image, rng)[..., None], 3, 2)
    mode = str(rng.choice(["none", *FOCUSED], p=[1 - sum(FOCUSED.values()), *FOCUSED.values()]))
    mask = None if mode == "none" else attended(drawn, rng)
    change = change_of(drawn, seed, number, shown)
    return view(image, mask, focus=mode, frame=encoder.frame, feather=FEATHER, change=change)


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


def untrained(seed: int, device: str = "cpu") -> ClipEncoder:
    """Build the pocket CLIP before training: a trunk with ImageNet weights, and random weights otherwise."""
    encoder = build_clip("pocket", f"random:{seed}", device)
    trunk = {name: value for name, value in imagenet_state().items() if not name.startswith("classifier.")}
    visual: Any = encoder.model.visual
    visual.trunk.load_state_dict(trunk)
    return encoder


class Pupil(nn.Module):
    """The trained parts of a CLIP: the text tower, the projection of the image tower and the scale."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.clip.visual.trunk = nn.Identity()

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode features (B, W) and tokens (B, n) as images and texts (B, D), each of length one."""
        clip, length = self.clip, tokens.shape[1]
        texts = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        texts = clip.ln_final(clip.transformer(texts, attn_mask=clip.attn_mask[:length, :length]))
        ends = texts[torch.arange(len(tokens)), tokens.argmax(1)]
        images = F.normalize(clip.visual.head(features), dim=-1)
        return images, F.normalize(ends @ clip.text_projection, dim=-1)


def loss(pupil: Pupil, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return a batch's loss, and the share of images with a true caption as the best."""
    images, texts = pupil(batch.features, batch.tokens)
    true = positives(batch.facts, batch.named)
    total = caption_loss(images, texts, true, pupil.clip.logit_scale.exp())
    best = (images @ texts.T).argmax(1, keepdim=True)
    return total, {
        "captions": float(total.detach()),
        "true": float(true.gather(1, best).float().mean()),
    }


def train(
    pool: Pool,
    seed: int,
    out: Path,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    warmup: int = 100,
    weight_decay: float = 0.05,
    workers: int = 0,
    device: str = "cpu",
    line: int = 0,
) -> None:
    """Train text tower and projection from random weights and write them to ``out`` as safetensors, float16.

    Raises ValueError if an interrupted training has other settings; see ``loop.train_and_write``.
    """
    encoder = untrained(seed, device)
    batches = Batches(pool, seed, batch_size, encoder)
    pupil = Pupil(encoder.model.train().requires_grad_(True)).to(device)

    def finished() -> Mapping[str, Tensor]:
        with torch.no_grad():
            pupil.clip.logit_scale.clamp_(max=np.log(100))
        return pupil.clip.state_dict()

    train_and_write(
        "pocket CLIP",
        out,
        Settings(seed, len(pool), 0, steps, batch_size, lr, warmup, weight_decay, clip=1.0),
        pool.name,
        pupil,
        dict(pupil.named_parameters()),
        batches,
        lambda batch: loss(pupil, batch.to(device)),
        finished,
        workers=workers,
        line=line,
    )
