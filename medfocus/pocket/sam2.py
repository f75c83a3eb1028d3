"""Training of the pocket SAM2 on pairs of a real image and its mask, and on phantoms.

The network is the sam2 package's (arXiv 2408.00714) in the configuration "pocket", without the modules for
video. Its trunk starts from ImageNet weights, and the last stages of the trunk train with the rest.
``examples`` makes the batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from medfocus.masks.sam2.model import IMAGE_MODULES, load_predictor
from medfocus.pocket.examples import IMAGE_SIZE, Batch, Batches
from medfocus.pocket.loop import Settings, train_and_write
from medfocus.pocket.pairs import Pairs
from medfocus.pocket.pool import Pool
from medfocus.storage.imagenet import imagenet_state

FROZEN_STAGES = 3  # of the trunk's seven; the ImageNet weights of its first stages stay
# Factor of the mask logits. Stability compares logits > 1 with logits > -1, and at a quarter of the model's
# resolution much of a small lesion is rim. The factor changes no mask; a power of two keeps every digit.
STEEPNESS = 4.0
CORRECTIONS = 2  # of a point's mask, in the second round
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as SAM2's transforms


def encode(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Encode images (B, 3, S, S) in [0, 1]: embedding (B, d, S/16, S/16), finer levels at S/4 and S/8.

    This is ``SAM2ImagePredictor.set_image_batch`` with gradients.
    """
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (_MEAN, _STD))
    pixels = ((images - mean) / std).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
    _, levels, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
    levels[-1] = levels[-1] + model.no_mem_embed
    maps = [
        level.permute(1, 2, 0).reshape(len(images), -1, *size)
        for level, size in zip(levels, sizes, strict=True)
    ]
    return maps[-1], maps[:-1]


def decode(
    model: Any, features: tuple[torch.Tensor, list[torch.Tensor]], coords: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode K prompts for each of B images, with ``coords`` (B, K, N, 2) and ``labels`` (B, K, N).

    Returns logits (BK, 4, S/4, S/4) and predicted quality (BK, 4): the single mask, then the three masks for
    ambiguous prompts.
    """
    embedding, fine = features
    count = coords.shape[1]
    points = (coords.flatten(0, 1), labels.flatten(0, 1))  # (BK, N, 2), (BK, N)
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=None)
    logits, quality, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=embedding.repeat_interleave(count, 0),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=[level.repeat_interleave(count, 0) for level in fine],
    )
    return logits, quality


def outline_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return SAM's loss, 20 x focal + dice: logits (..., h, w), target (..., h, w) in [0, 1] -> (...)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = logits.sigmoid()
    missed = inside + target - 2 * inside * target  # 1 - probability of the truth
    share = 0.25 * target + 0.75 * (1 - target)
    focal = (share * missed.square() * entropy).mean((-2, -1))
    both = (inside * target).sum((-2, -1))
    dice = 1 - (2 * both + 1) / (inside.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def true_quality(masks: torch.Tensor, regions: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """Return the best IoU x worth: masks (n, M, h, w), regions (n, R, h, w), worth (n, R) -> (n, M)."""
    a, b = masks.flatten(2).float(), regions.flatten(2).float()
    both = a @ b.mT  # (n, M, h·w) @ (n, h·w, R) -> (n, M, R)
    either = a.sum(2)[:, :, None] + b.sum(2)[:, None] - both
    return (both / either.clamp(min=1) * worth[:, None]).amax(2)


def loss(model: Any, batch: Batch, corrections: int = 0) -> tuple[torch.Tensor, dict[str, float]]:
    """Return a batch's loss, and the values to watch.

    These are the outline loss and the error of the predicted quality over all prompts, and the true quality
    of the mask with the highest predicted quality: at a point on a lesion, without a prompt, and after the
    last correction. A correction adds a point where this mask is wrong, see ``corrected``. The points in
    parts get ``corrections`` of them, one after another.

    The outline loss trains the best of the three masks and, for prompts of several points, also the single
    mask. The quality loss trains all four masks. The true quality of a single point's mask is the best over
    all regions that contain the point.
    """
    features = encode(model, batch.images)
    half = F.avg_pool2d(batch.regions.float(), 2)  # (B, R, S/2, S/2)
    small = F.avg_pool2d(half, 2)  # (B, R, S/4, S/4)
    outlines, errors = [], []

    def learn(coords: torch.Tensor, labels: torch.Tensor, aims: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Note the losses of (B, K, N) points; return the masks (B, K, S/4, S/4), their quality, the aims."""
        logits, predicted = decode(model, features, coords, labels)  # (n, 4, S/4, S/4), (n, 4)
        count, length = coords.shape[1:3]
        meant = aims.flatten()
        valid, rows = meant >= 0, torch.arange(len(meant), device=meant.device)
        image = rows // count
        worth = batch.worth[image] * valid[:, None]  # (n, R)
        chosen = F.one_hot(meant.clamp(min=0), worth.shape[1])
        if length == 1:
            x, y = coords.flatten(0, 1)[:, 0].long().clamp(0, IMAGE_SIZE - 1).unbind(1)
            at_point = batch.regions[image, :, y, x].clone()
            at_point[:, 0] = False
            is_point = labels.flatten(0, 1)[:, :1] == 1
            worth = worth * torch.where(is_point, at_point, chosen.bool())
        else:
            worth = worth * chosen
        with torch.no_grad():
            quality = true_quality(logits > 0, small[image] >= 0.5, worth)  # (n, 4)
            low = small[image, meant.clamp(min=0)][:, None]  # (n, 1, S/4, S/4)
            best = outline_loss(logits[:, 1:], low.expand(-1, 3, -1, -1)).argmin(1) + 1  # (n,)
        target = half[image, meant.clamp(min=0)][valid]  # (v, S/2, S/2)
        columns = [best] if length == 1 else [best, torch.zeros_like(best)]
        for column in columns:
            drawn = logits[valid, column[valid]][:, None]  # (v, 1, S/4, S/4)
            full = F.interpolate(drawn, target.shape[1:], mode="bilinear")[:, 0]
            outlines.append(outline_loss(full, target) / len(columns))
        errors.append((predicted - quality).abs().mean(1))
        picked = predicted[:, 1:].argmax(1) + 1  # (n,)
        masks = logits[rows, picked].detach() > 0
        return masks.unflatten(0, (-1, count)), quality[rows, picked].unflatten(0, (-1, count)), aims

    watched = {}
    for number, prompt in enumerate(zip(batch.coords, batch.labels, batch.aims, strict=True)):
        masks, quality, aims = learn(*prompt)
        if number:
            continue
        for name, column in (("point", 0), ("none", 3)):
            watched[name] = float(quality[:, column][aims[:, column] >= 0].mean())
        coords, labels, aims = (of_all[:, :2] for of_all in prompt)  # the points in parts
        for _ in range(corrections):
            region = small.gather(1, aims.clamp(min=0)[..., None, None].expand(-1, -1, *small.shape[2:]))
            coords, labels, aims = corrected(coords, labels, aims, masks[:, :2], region >= 0.5)
            masks, quality, _ = learn(coords, labels, aims)
        watched["corrected"] = float(quality[:, 0][aims[:, 0] >= 0].mean())
    outline, off = torch.cat(outlines).mean(), torch.cat(errors).mean()
    watched |= {"outline": float(outline.detach()), "off": float(off.detach())}
    return outline + 2 * off, watched


def corrected(
    coords: torch.Tensor, labels: torch.Tensor, aims: torch.Tensor, masks: torch.Tensor, regions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add to each prompt (B, K, N) the point that a reader would add: deep in what is missed or wrong.

    ``masks`` and ``regions`` are (B, K, h, w) bool. The aim of a prompt whose mask is right becomes -1.
    """
    missed, wrong = (regions & ~masks).float(), (masks & ~regions).float()
    depth = sum(  # two windows: the small one tells rims from areas, the large one finds the middle
        each * F.avg_pool2d(each, side, 1, side // 2) for each in (missed, wrong) for side in (5, 17)
    )
    at = torch.as_tensor(depth).flatten(2).argmax(2)  # (B, K)
    width = masks.shape[3]
    point = torch.stack([at % width, at // width], dim=2) + 0.5  # (B, K, 2) in pixels of the masks
    label = missed.flatten(2).gather(2, at[..., None]).long()  # (B, K, 1)
    aims = aims.where((masks ^ regions).flatten(2).any(2), -1)
    return (
        torch.cat([coords, point[:, :, None] * (IMAGE_SIZE / width)], dim=2),
        torch.cat([labels, label], dim=2),
        aims,
    )


def train(
    pool: Pool,
    seed: int,
    out: Path,
    *,
    pairs: Pairs | None,
    steps: int,
    batch_size: int = 8,
    warmup: int = 200,
    weight_decay: float = 0.02,
    workers: int = 0,
    device: str = "cpu",
    line: int = 0,
    first: Path | None = None,
) -> None:
    """Train a round and write the image modules to ``out``, safetensors, float16.

    The first round starts from ImageNet weights of the trunk. The second round starts from the file ``first``
    that the first has written; it also learns from corrections.
    Raises ValueError if an interrupted training has other settings; see ``loop.train_and_write``.
    """
    checkpoint = f"random:{seed}" if first is None else str(first)
    model = load_predictor("pocket", checkpoint, IMAGE_SIZE, device=device)[0].model
    if first is None:
        net = model.image_encoder.trunk.net
        state = imagenet_state()
        net.load_state_dict({name: state[name] for name in net.state_dict()})
    else:
        steepen(model, 1 / STEEPNESS)
    model.train()
    trained = {k: v for k, v in model.named_parameters() if k.startswith(IMAGE_MODULES)}
    stages = ("conv_stem", "bn1", *(f"blocks.{i}" for i in range(FROZEN_STAGES)))
    frozen = tuple(f"image_encoder.trunk.net.{name}." for name in stages)
    trained = {k: v for k, v in trained.items() if not k.startswith(frozen)}
    for parameter in trained.values():
        parameter.requires_grad_(True)

    def finished() -> dict[str, torch.Tensor]:
        steepen(model, STEEPNESS)
        return {k: v for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}

    sources = sorted({row.source for row in pairs.rows}) if pairs else []
    train_and_write(
        "pocket SAM2",
        out,
        Settings(
            seed=seed,
            images=len(pool),
            pairs=len(pairs.rows) if pairs else 0,
            steps=steps,
            batch_size=batch_size,
            lr=6e-4 if first is None else 3e-4,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=0.1,
        ),
        f"{pool.name}; {len(sources)} sources of pairs" if pairs else pool.name,
        model,
        trained,
        Batches(pool, pairs, seed if first is None else seed + 1, batch_size),
        lambda batch: loss(model, batch.to(device), 0 if first is None else CORRECTIONS),
        finished,
        workers=workers,
        line=line,
    )


def steepen(model: Any, factor: float) -> None:
    """Multiply all mask logits of a model by ``factor``, through its last layers and in place."""
    with torch.no_grad():
        for network in model.sam_mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight *= factor
            network.layers[-1].bias *= factor
