"""SAM2 as a zero-shot segmenter: point and box prompts that need no label -> one mask a picture.

A picture is encoded once (in batches), all its prompts are decoded together, candidates are scored on
the low-resolution logits, and the winners alone are brought to the picture's resolution. Everything
goes through the sam2 package (arXiv 2408.00714): its configurations, its ``SAM2ImagePredictor`` for
encoding, its decoder, and for the strategy ``automatic`` its ``SAM2AutomaticMaskGenerator``.
"""

from __future__ import annotations

import importlib.resources
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from medfocus import weights
from medfocus.masks import choose
from medfocus.masks.segmenter import Mask, check_picture, identity, settings_key

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor

STRATEGIES = ("automatic", "grid", "center", "box")
SIZE_STEP = 32  # pixels: patches of 4 in windows of 8

# Fewer point prompts at once cost overhead, more fall out of the processor's cache: at 1024 px four at
# once took 40 ms a point and sixteen 80 ms. This bounds the decoder's largest tensor.
_DECODE_BYTES = 32 * 2**20
# The generator brings every candidate to full resolution as float32 before it filters.
_GENERATE_BYTES = 256 * 2**20

# What a picture needs of a checkpoint; the rest serves video, and may be absent.
PICTURE_PATH = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
# As sam2.build_sam does: an unstable single mask gives way to the best of the three.
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_SIZE_LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


@dataclass(frozen=True, eq=False)
class Features:
    """A batch of B encoded pictures, as the mask decoder takes them; S is the model's image size."""

    embedding: torch.Tensor  # (B, d, S/16, S/16)
    fine: tuple[torch.Tensor, ...]  # (B, d/8, S/4, S/4), (B, d/4, S/8, S/8)


@dataclass(frozen=True, eq=False)
class Prompts:
    """P prompts of N points each, in sides of the picture, so that (0.5, 0.5) is its centre."""

    coords: np.ndarray  # (P, N, 2) float32, (x, y)
    labels: np.ndarray  # (P, N) int32: 1 inside, 0 outside, 2 and 3 a box's top left and bottom right


class Sam2Segmenter:
    """One mask a picture from SAM2 by one of ``STRATEGIES``, with the fallback ladder.

    Candidates within the limits (status "chosen"), else within relaxed limits ("relaxed"), else what the
    box around the whole picture gives ("box"), else the whole picture ("identity"). For one thread at a time.
    """

    def __init__(
        self,
        predictor: SAM2ImagePredictor,
        model_key: str,
        *,
        strategy: str,
        points_per_side: int,
        keep: int,
        limits: choose.Limits,
        max_overlap: float = 0.3,
        box_side: float = 1.0,
        batch_size: int = 4,
    ) -> None:
        """Wrap a predictor of ``load_predictor``; one predictor may serve several segmenters.

        ``points_per_side`` is for "automatic" and "grid"; ``box_side`` for "box", the side of its centred
        box as a share of the picture's. ``keep`` distinct candidates (see ``choose.pick``) are united.
        Raises ValueError for an unknown strategy or a number out of range.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"Unknown mask strategy {strategy!r}; known: {', '.join(STRATEGIES)}.")
        for name, value in (("points_per_side", points_per_side), ("keep", keep), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more.")
        if not 0 < box_side <= 1:
            raise ValueError(f"box_side is {box_side}; use a share of the picture in (0, 1].")
        self.predictor = predictor
        self.strategy = strategy
        self.keep = keep
        self.limits = limits
        self.max_overlap = max_overlap
        self.batch_size = batch_size
        self.points_per_side = points_per_side
        if strategy == "box":
            self.prompts = box_prompt(box_side)
        else:
            self.prompts = grid_prompts(1 if strategy == "center" else points_per_side)
        self.key = settings_key(
            "sam2",
            {
                "model": model_key,
                "strategy": strategy,
                "points_per_side": points_per_side,
                "keep": keep,
                "limits": asdict(limits),
                "max_overlap": max_overlap,
                "box_side": box_side,
            },
        )

    @property
    def model(self) -> SAM2Base:
        """The network."""
        return self.predictor.model

    def segment(self, pictures: Sequence[np.ndarray]) -> list[Mask]:
        """Pictures, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        masks: list[Mask] = []
        with torch.inference_mode():
            for start in range(0, len(pictures), self.batch_size):
                batch = [check_picture(picture) for picture in pictures[start : start + self.batch_size]]
                if self.strategy == "automatic":
                    masks += [self._generated(picture) for picture in batch]
                    continue
                features = self.encode(batch)
                masks += [self._decoded(picture, features, i) for i, picture in enumerate(batch)]
        return masks

    def encode(self, pictures: Sequence[np.ndarray]) -> Features:
        """Pictures of any sizes, squeezed to (S, S), through the image encoder as one batch of B."""
        self.predictor.set_image_batch(list(pictures))
        kept: Any = self.predictor._features  # what predict() itself reads; there is no public door
        self.predictor.reset_predictor()
        return Features(kept["image_embed"], tuple(kept["high_res_feats"]))

    def decode(self, features: Features, index: int, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
        """All prompts of picture ``index`` of the batch -> three candidates a prompt, M = 3P.

        Returns their logits (M, S/4, S/4) float32 (> 0 inside) and predicted IoU (M,) float32. They are
        decoded in chunks that bound the memory.
        """
        device = features.embedding.device
        coords = self.predictor._transforms.transform_coords(torch.from_numpy(prompts.coords).to(device))
        labels = torch.from_numpy(prompts.labels).to(device)
        embedding = features.embedding[index : index + 1]  # (1, d, S/16, S/16)
        fine = [level[index : index + 1] for level in features.fine]
        position = self.model.sam_prompt_encoder.get_dense_pe()  # (1, d, S/16, S/16)
        chunk = max(1, _DECODE_BYTES // (4 * fine[0].numel()))
        logits, predicted_iou = [], []
        for start in range(0, len(coords), chunk):
            points = (coords[start : start + chunk], labels[start : start + chunk])
            sparse, dense = self.model.sam_prompt_encoder(points=points, boxes=None, masks=None)
            low, iou, _, _ = self.model.sam_mask_decoder(
                image_embeddings=embedding,
                image_pe=position,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                repeat_image=True,
                high_res_features=fine,
            )  # (p, 3, S/4, S/4), (p, 3)
            logits.append(low.flatten(0, 1).float().cpu())
            predicted_iou.append(iou.flatten().float().cpu())
        return torch.cat(logits).numpy(), torch.cat(predicted_iou).numpy()

    def _decoded(self, picture: np.ndarray, features: Features, index: int) -> Mask:
        """The whole ladder for one encoded picture."""
        logits, iou = _finite(*self.decode(features, index, self.prompts))
        choice = choose.choose(
            logits > 0,
            iou,
            choose.stability(logits),
            self.limits,
            keep=self.keep,
            max_overlap=self.max_overlap,
        )
        if choice is not None:
            region = _upsampled(logits[list(choice.indices)], picture)
            if region.any():
                return Mask(region, choice.score, choice.status)
        return self._boxed(picture, features, index)

    def _generated(self, picture: np.ndarray) -> Mask:
        """The whole ladder for one picture, its candidates from SAM2's own generator.

        The generator filters by its thresholds before it removes duplicates, so relaxed thresholds need
        a second run of it.
        """
        for status, limits in (("chosen", self.limits), ("relaxed", self.limits.relaxed())):
            regions, iou, steady = self._proposals(picture, limits)
            best = choose.pick(regions, iou, steady, limits, keep=self.keep, max_overlap=self.max_overlap)
            if best is not None:
                return Mask(choose.unite(regions[list(best[0])]), best[1], status)
        return self._boxed(picture, self.encode([picture]), 0)

    def _proposals(
        self, picture: np.ndarray, limits: choose.Limits
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the generator finds: regions (M, H, W) bool, predicted IoU (M,), stability (M,)."""
        height, width = picture.shape[:2]
        generator = self._generator
        generator.pred_iou_thresh = limits.min_iou
        generator.stability_score_thresh = limits.min_stability
        generator.points_per_batch = max(1, min(64, _GENERATE_BYTES // (3 * 4 * height * width)))
        found = generator.generate(picture)
        regions = [one["segmentation"] for one in found]
        return (
            np.stack(regions) if regions else np.zeros((0, height, width), dtype=bool),
            np.array([one["predicted_iou"] for one in found]),
            np.array([one["stability_score"] for one in found]),
        )

    @cached_property
    def _generator(self) -> SAM2AutomaticMaskGenerator:
        """SAM2's own generator around this predictor; its own would believe in 1024 px."""
        from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see load_predictor
            generator = SAM2AutomaticMaskGenerator(self.model, points_per_side=self.points_per_side)
        generator.predictor = self.predictor
        return generator

    def _boxed(self, picture: np.ndarray, features: Features, index: int) -> Mask:
        """The last two rungs: the box around the whole picture, else the whole picture."""
        logits, iou = _finite(*self.decode(features, index, box_prompt(1.0)))
        steady = choose.stability(logits)
        best = choose.pick(
            logits > 0, iou, steady, self.limits.relaxed(), keep=1, max_overlap=self.max_overlap
        )
        if best is not None:
            region = _upsampled(logits[list(best[0])], picture)
            if region.any():
                return Mask(region, best[1], "box")
        return identity(*picture.shape[:2])


def build_segmenter(
    config: str,
    checkpoint: str,
    image_size: int,
    strategy: str,
    *,
    points_per_side: int = 4,
    keep: int = 1,
    min_area: float = 0.01,
    max_area: float = 0.70,
    min_iou: float = 0.7,
    min_stability: float = 0.85,
    max_overlap: float = 0.3,
    box_side: float = 1.0,
    batch_size: int = 4,
    device: str = "cpu",
) -> Sam2Segmenter:
    """A segmenter out of plain settings; see ``load_predictor`` and ``Sam2Segmenter``.

    ``min_area`` and ``max_area`` are shares of the picture; ``keep`` is 2 for a chest X-ray, whose lungs
    are two regions, else 1. ``min_iou`` and ``min_stability`` lie below the 0.8 and 0.95 that SAM2's
    generator has for photographs: the score ranks, the thresholds only keep out what is no region.
    """
    predictor, model_key = load_predictor(config, checkpoint, image_size, device=device)
    return Sam2Segmenter(
        predictor,
        model_key,
        strategy=strategy,
        points_per_side=points_per_side,
        keep=keep,
        limits=choose.Limits(min_area, max_area, min_iou, min_stability),
        max_overlap=max_overlap,
        box_side=box_side,
        batch_size=batch_size,
    )


def load_predictor(
    config: str, checkpoint: str, image_size: int, *, device: str = "cpu"
) -> tuple[SAM2ImagePredictor, str]:
    """Build SAM2's picture path and its image predictor; also its key, which names weights and config.

    Args:
        config: "pocket", a configuration of the sam2 package ("configs/sam2.1/sam2.1_hiera_t.yaml",
            "sam2.1_hiera_t" or "sam2.1_hiera_tiny"), or the path of a YAML file of the same shape.
        checkpoint: "pocket", the packaged weights of the configuration "pocket"; a local path; a hub id such
            as "facebook/sam2.1-hiera-tiny"; or "random:SEED", which is weights that have learnt NOTHING: for
            clocks and tests, its masks mean nothing at all.
        image_size: Pixels a side that the model sees, a multiple of 32; it needs not be the config's own.
        device: Where the model runs. It is no part of the key.

    Raises:
        FileNotFoundError: There is no such configuration or checkpoint.
        ValueError: The image size does not fit, or the checkpoint is not one of this configuration.
    """
    if image_size < SIZE_STEP or image_size % SIZE_STEP:
        near = max(SIZE_STEP, round(image_size / SIZE_STEP) * SIZE_STEP)
        raise ValueError(
            f"image_size is {image_size}; SAM2 takes multiples of {SIZE_STEP} pixels, {near} for one."
        )
    seed, state = 0, None
    if checkpoint.startswith("random:"):
        if not checkpoint.removeprefix("random:").isdigit():
            raise ValueError(
                f"checkpoint is {checkpoint!r}; random weights are spelt random:0, random:1, ..."
            )
        seed = int(checkpoint.removeprefix("random:"))
    else:
        hub_id = checkpoint if checkpoint.count("/") == 1 else None
        hub_name = checkpoint.rpartition("/")[2].replace("-", "_") + ".pt"  # as facebook/sam2.1-hiera-* do
        name = str(_packaged("data/sam2_pocket.safetensors")) if checkpoint == "pocket" else checkpoint
        path = weights.resolve(name, hub_id=hub_id, filename=hub_name, what="masks.checkpoint (SAM2)")
        state = weights.load(path)

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    settings = _read_config(config, image_size)
    # Building draws random numbers; the caller's generators stay as they are.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model: SAM2Base = instantiate(settings, _recursive_=True)
    if state is not None:
        _load_picture_path(model, state, f"SAM2 checkpoint {checkpoint}", config)
    model = model.eval().requires_grad_(False).to(device)

    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its transforms call torch.jit.script
        predictor = SAM2ImagePredictor(model)
    # The class has the sizes of 1024 px written in. Strides 4, 8 and 16:
    predictor._bb_feat_sizes = [(image_size // stride, image_size // stride) for stride in (4, 8, 16)]
    picture_path = {k: v for k, v in model.state_dict().items() if k.startswith(PICTURE_PATH)}
    parts = (OmegaConf.to_yaml(settings), weights.digest(picture_path), version("sam2"))
    return predictor, "\n".join(parts)


def grid_prompts(points_per_side: int) -> Prompts:
    """One point a prompt, on a regular grid in the cells' centres: P = points_per_side², N = 1."""
    ticks = (np.arange(points_per_side, dtype=np.float32) + 0.5) / points_per_side
    x, y = np.meshgrid(ticks, ticks)
    coords = np.stack([x, y], axis=-1).reshape(-1, 1, 2)  # (P, 1, 2)
    return Prompts(coords, np.ones((len(coords), 1), dtype=np.int32))


def box_prompt(side: float) -> Prompts:
    """One box in the centre whose sides are ``side`` of the picture's: P = 1, N = 2 (its corners)."""
    low, high = (1 - side) / 2, (1 + side) / 2
    coords = np.array([[[low, low], [high, high]]], dtype=np.float32)  # (1, 2, 2)
    return Prompts(coords, np.array([[2, 3]], dtype=np.int32))


def _finite(logits: np.ndarray, predicted_iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only the candidates (M, h, w) and (M,) whose every number is finite: a broken one must not win."""
    sound = np.isfinite(logits).all((1, 2)) & np.isfinite(predicted_iou)
    return (logits, predicted_iou) if sound.all() else (logits[sound], predicted_iou[sound])


def _upsampled(logits: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The winners' logits (M, h, w) -> their union (H, W) bool at the picture's resolution."""
    size = picture.shape[:2]
    full = F.interpolate(torch.from_numpy(logits)[None], size, mode="bilinear", align_corners=False)
    return choose.unite((full[0] > 0).numpy())


def _read_config(config: str, image_size: int) -> DictConfig:
    """The model's settings of a configuration, for pictures of ``image_size`` and without video."""
    from omegaconf import DictConfig, OmegaConf

    content = OmegaConf.load(config_path(config))
    model = content.get("model") if isinstance(content, DictConfig) else None
    if not isinstance(model, DictConfig) or "_target_" not in model:
        raise ValueError(
            f"SAM2 config {config!r}: it has no section 'model' with a '_target_'. "
            "Start from one of the sam2 package's configs/."
        )
    model.image_size = image_size
    model.memory_attention = None
    model.memory_encoder = None
    model.sam_mask_decoder_extra_args = {
        **(model.get("sam_mask_decoder_extra_args") or {}),
        **_DYNAMIC_MULTIMASK,
    }
    OmegaConf.resolve(content)
    return model


def config_path(config: str) -> Path:
    """The file of a configuration's name; see ``load_predictor``. FileNotFoundError lists the names."""
    if config == "pocket":
        return _packaged("configs/sam2_pocket.yaml")
    local = Path(config).expanduser()
    if local.is_file():
        return local
    package = Path(str(importlib.resources.files("sam2")))
    if (package / config).is_file():
        return package / config
    short = config.removesuffix(".yaml")
    for word, letter in _SIZE_LETTERS.items():
        short = re.sub(f"_{word}$", f"_{letter}", short)
    folders = ("sam2", "sam2.1")
    known = {path.stem: path for folder in folders for path in package.glob(f"configs/{folder}/*.yaml")}
    if short not in known:
        raise FileNotFoundError(
            f"SAM2 config {config!r} is no file and no configuration of the sam2 package. "
            f"Known: pocket, {', '.join(sorted(known))}."
        )
    return known[short]


def _packaged(name: str) -> Path:
    """A file that travels in the package."""
    return Path(str(importlib.resources.files("medfocus").joinpath(name)))


def _load_picture_path(model: SAM2Base, state: dict[str, torch.Tensor], place: str, config: str) -> None:
    """Load what a picture needs of a checkpoint, all of it; what serves video may be absent or there."""
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(PICTURE_PATH)}
    given = {k: v for k, v in state.items() if k.startswith(PICTURE_PATH)}
    faults = [f"{k} is missing" for k in wanted if k not in given]
    faults += [f"{k} is not known" for k in given if k not in wanted]
    faults += [
        f"{k} has shape {tuple(given[k].shape)}, not {tuple(shape)}"
        for k, shape in wanted.items()
        if k in given and given[k].shape != shape
    ]
    if faults:
        raise ValueError(
            f"{place} does not fit the config {config!r}: {len(faults)} of {len(wanted)} tensors differ "
            f"({'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}). "
            "Name the config that the weights were made for."
        )
    model.load_state_dict(given, strict=False)
