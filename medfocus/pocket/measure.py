"""What the pocket models are worth on drawn images that nothing has learnt from, and their cards."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from medfocus import phantoms
from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import class_embeddings, text_prompts
from medfocus.focus.view import view
from medfocus.masks.quality import innermost, iou, pointed
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.pocket.clip import FEATHER
from medfocus.pocket.pool import held_out
from medfocus.pocket.sam2 import IMAGE_SIZE
from medfocus.reports.figures import mask_sheet

POINTS_PER_SIDE = 8  # of the choice without a prompt from outside: the default of params.yaml
TOLERANCE = 0.1  # of every figure between two trainings from the same seed on different machines
FOCUSES = ("none", "multiply", "crop")
_SHEET_COLOURS = 32


def segmenter(weights_file: Path) -> Sam2Segmenter:
    """The pocket SAM2 of a file, as the default study uses it."""
    return load_sam2(
        Sam2Settings(
            *("pocket", str(weights_file), IMAGE_SIZE, "grid"),
            points_per_side=POINTS_PER_SIDE,
            follow_edges=True,
        ),
        batch_size=16,
    )


def measure_masks(weights_file: Path, per_class: int) -> dict[str, dict[str, float]]:
    """Mean IoU with the lesion on held-out phantoms of 192 px, "modality/class" -> figure -> value.

    "point": of the mask that the quality head picks for the innermost point; "anywhere": for a random one;
    "best": of the best of the three for the innermost; "unprompted": of the mask chosen without a prompt from
    outside; the share of each rung of the ladder that was taken. "anatomy": the mean over parts of the IoU
    for the innermost point of each. A class without lesion has only the last two.
    """
    one = segmenter(weights_file)
    found: dict[str, dict[str, float]] = {}
    for modality, labels in phantoms.MODALITIES.items():
        for label in labels:
            rng = np.random.default_rng(0)
            drawn = [held_out(modality, label, n) for n in range(per_class)]
            images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
            values: dict[str, list[float]] = defaultdict(list)
            for phantom, image, mask in zip(drawn, images, one.segment(images), strict=True):
                for status in ("chosen", "relaxed", "box", "identity"):
                    values[status].append(float(mask.status == status))
                for part in phantom.parts.values():
                    own = part & ~phantom.region
                    if own.mean() > 0.01:
                        values["anatomy"].append(iou(pointed(one, image, [innermost(own)])[0], part))
                if not phantom.region.any():
                    continue
                picked, three = pointed(one, image, [innermost(phantom.region)])
                y, x = rng.choice(np.argwhere(phantom.region))
                anywhere, _ = pointed(one, image, [((x + 0.5) / 192, (y + 0.5) / 192)])
                values["point"].append(iou(picked, phantom.region))
                values["best"].append(max(iou(each, phantom.region) for each in three))
                values["anywhere"].append(iou(anywhere, phantom.region))
                values["unprompted"].append(iou(mask.region, phantom.region))
            found[f"{modality}/{label}"] = {name: _mean(each) for name, each in values.items()}
    return found


def measure_zero_shot(weights_file: Path, sam2_file: Path, per_class: int) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy on held-out phantoms, modality -> "chance" and ``FOCUSES`` (SAM2's masks)."""
    clip, one = build_clip("pocket", str(weights_file)), segmenter(sam2_file)
    found = {}
    for modality, labels in phantoms.MODALITIES.items():
        drawn = [held_out(modality, label, n) for label in labels for n in range(per_class)]
        truth = np.repeat(np.arange(len(labels)), per_class)
        images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
        masks = [mask.region for mask in one.segment(images)]
        texts = class_embeddings(clip, text_prompts(labels, modality))
        found[modality] = {"chance": round(1 / len(labels), 3)}
        for focus in FOCUSES:
            views = [
                view(image, mask, focus=focus, size=clip.image_size, feather=FEATHER)
                for image, mask in zip(images, masks, strict=True)
            ]
            best = (_encoded(clip, np.stack(views)) @ texts.T).argmax(1).numpy()
            found[modality][focus] = _mean(best == truth)
    return found


def _encoded(clip: ClipEncoder, views: np.ndarray) -> torch.Tensor:
    return torch.cat(
        [clip.encode_images(clip.preprocess(part)) for part in torch.from_numpy(views).split(64)]
    )


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 3)


def beyond_tolerance(now: Mapping[str, Any], before: Mapping[str, Any], place: str = "") -> list[str]:
    """Where two sets of figures of the same shape differ by more than ``TOLERANCE``, a line each."""
    lines = []
    for name, value in now.items():
        if name not in before:
            lines.append(f"{place}{name}: the package's has no such figure")
        elif isinstance(value, Mapping):
            lines += beyond_tolerance(value, before[name], f"{place}{name} ")
        elif abs(value - before[name]) > TOLERANCE:
            lines.append(f"{place}{name}: {value} where the package's has {before[name]}")
    return lines


def sheet(weights_file: Path, per_modality: int, columns: int) -> bytes:
    """PNG of held-out phantoms with the outline of the mask chosen without a prompt from outside."""
    drawn = [
        held_out(modality, labels[n % len(labels)], 10_000 + n)
        for modality, labels in phantoms.MODALITIES.items()
        for n in range(per_modality)
    ]
    images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
    masks = segmenter(weights_file).segment(images)
    captions = [f"{p.label}: {mask.status}" for p, mask in zip(drawn, masks, strict=True)]
    png = mask_sheet(images, [mask.region for mask in masks], captions, columns)
    few = Image.open(io.BytesIO(png)).quantize(
        _SHEET_COLOURS, dither=Image.Dither.NONE
    )  # a third of the size
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


def card(name: str, weights_file: Path, figures: Mapping[str, Mapping[str, float]], per_class: int) -> str:
    """The model card, Markdown: what is in CARDS of the model, its training as recorded, its figures."""
    with safe_open(weights_file, "pt") as file:
        notes = file.metadata()
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  # no mapping
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    rows = [[key, *(_cell(row.get(column)) for column in columns)] for key, row in figures.items()]
    lines = [["", *columns], ["---", *("---:" for _ in columns)], *rows]
    title, text = CARDS[name]
    trained = "\n".join(f"- {key}: {value}" for key, value in sorted(notes.items()))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    megabytes = weights_file.stat().st_size / 1e6
    return f"""# {title}

{count / 1e6:.2f} M parameters, float16, {megabytes:.1f} MB. **Not for clinical use**: it has
learned from drawn images alone.

{text}

## Training

AdamW, a linear warm-up and a cosine to 0, clipped gradients, float32, one thread:

{trained}

`make pocket` trains it again from the seed and compares its scores with these; on another machine each score
is within {TOLERANCE}. No image of any data set, drawn or real, is among the training images.

## Measured

On {per_class} held-out phantoms per class, with a generator seed that neither training nor data sets use.

{table}
"""


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


CARDS: dict[str, tuple[str, str]] = {
    "sam2_pocket": (
        "Pocket SAM2",
        """The model consists of the `sam2` package's own modules, in the configuration
`medfocus/configs/sam2_pocket.yaml` and with SAM2's published names, without the modules for video.
`medfocus.masks.sam2.segmenter` loads it as the checkpoint `pocket`.

It differs from the published SAM2 in two points. The quality head predicts IoU x 1 for a lesion and IoU x
0.45 for anatomy, so that a lesion is "chosen" without a prompt and anatomy is only "relaxed". The mask
logits are multiplied by 4 after training, which changes no mask: stability compares logits > 1 with logits
> -1, and most of a lesion in a mask of 32 px is rim.

The loss is 20 x focal + dice on the best of three masks (for boxes also on the single mask), plus twice the
L1 error of the quality of all four. Each image gives four points (one of them random) and one box; 65 % of
them aim at a lesion.

The table shows the mean IoU with the lesion. `point`: the mask that the quality head picks for the
innermost point. `best`: the best of its three masks. `anywhere`: the mask picked for a random point.
`unprompted`: the mask chosen from 8 x 8 points without a prompt. `anatomy`: the mask picked for the
innermost point of lungs, heart, brain or ventricles. `chosen`, `relaxed`, `box` and `identity`: the share
of each step of the fallback. All masks follow the edges of the image (`follow_edges: true`, the default).

Limits: masks are 32 px a side before they are enlarged; regions under 1 % of an image are not reliable.
Faint lesions in a lung are the weakest.""",
    ),
    "clip_pocket": (
        "Pocket CLIP",
        """The model is an open_clip model in the configuration `medfocus/configs/clip_pocket.json` (96 px),
with its own tokenizer (`bpe_pocket.txt.gz`). `open_clip.create_model("clip_pocket", pretrained=FILE)` loads
it after `open_clip.add_model_config` has read the configuration; `medfocus.clip.encoder` does both for the
name `pocket`.

It learns from drawn images and captions that name modality, finding, region, side and size. A caption is a
positive of every image in the batch that it describes correctly. Most images have a visual prompt (25 %
`multiply`, 25 % `crop`, 12 % `overlay`, `contour` or `blur`) with a rough and partly wrong mask. During
training, a linear head on the patches also learns to locate lesion and anatomy; the head is not kept.

The table shows zero-shot accuracy with the templates of `medfocus.clip.prompts`: on the whole image
(`none`), and under `multiply` and `crop` with the masks that the pocket SAM2 chooses without a prompt.

Limits: it knows three kinds of drawn images and eleven classes. On real images its texts mean little; the
results in the documentation show the worth of its image encoder there.""",
    ),
}
