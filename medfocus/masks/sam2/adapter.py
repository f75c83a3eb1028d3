"""Train adapters of SAM2 on known regions: SAM-Adapter, arXiv 2304.09148.

The adapters add P_i = MLP_up(GELU(MLP_i(F_patch + F_hfc))) to the input of each block i of the encoder.
F_patch is the input of the block's stage and F_hfc the embedded high frequencies of the image, both
projected to fewer channels. Each block has its own MLP_i, and each stage its own MLP_up. A stage is a run of
blocks with inputs of the same width, as in the authors' version for SAM2 (arXiv 2408.04579). The blocks are
those of a Hiera, or the stages of a ``ConvTrunk``, where each block is a stage of its own. The encoder is
frozen; adapters and mask decoder train. Unlike in the paper, MLP_up starts at 0, so that training
starts from SAM2 itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfocus.masks import candidates
from medfocus.masks.sam2.segmenter import Rung, Sam2Segmenter
from medfocus.masks.sam2.trunk import ConvTrunk
from medfocus.masks.segmenter import Mask, check_image, segmenter_key
from medfocus.storage import weights
from medfocus.storage.fingerprint import fingerprint

LOW_SHARE = 0.25  # share of the spectrum's area that F_hfc removes, as in the authors' code


class Pairs(Protocol):
    """A sequence of images (H, W, 3) uint8 RGB of any sizes with their regions (H, W) bool."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class EncoderAdapters(nn.Module):
    """The adapters of all blocks."""

    def __init__(self, inputs: Sequence[tuple[int, int]], inner: Sequence[int]) -> None:
        """Build untrained adapters with ``inner`` channels per stage.

        ``inputs`` has the width and the stride of each block's input.
        """
        super().__init__()
        stages = stages_of(inputs)
        self.stages = [number for number, (_, _, blocks) in enumerate(stages) for _ in range(blocks)]
        # F_hfc at the resolution of each stage.
        high: list[nn.Module] = []
        for i, ((_, stride, _), n) in enumerate(zip(stages, inner, strict=True)):
            first = nn.Conv2d(3, n, 7, stride=stride, padding=3)
            high.append(first if i == 0 else nn.Conv2d(inner[i - 1], n, 3, stride // stages[i - 1][1], 1))
        self.high = nn.ModuleList(high)
        self.patch = nn.ModuleList(nn.Linear(w, n) for (w, _, _), n in zip(stages, inner, strict=True))
        self.tune = nn.ModuleList(nn.Linear(inner[stage], inner[stage]) for stage in self.stages)
        self.up = nn.ModuleList(nn.Linear(n, w) for (w, _, _), n in zip(stages, inner, strict=True))
        for up in cast("Iterator[nn.Linear]", iter(self.up)):
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Compute F_hfc (B, h, w, n) of each stage from pixels (B, 3, S, S)."""
        level, levels = high_frequencies(pixels), []
        for embed in self.high:
            level = embed(level)
            levels.append(level.permute(0, 2, 3, 1))
        return levels

    def prompt(self, block: int, features: Tensor) -> Tensor:
        """Compute P_i (B, h, w, W) of a block from F_patch + F_hfc of its stage (B, h, w, n)."""
        return self.up[self.stages[block]](F.gelu(self.tune[block](features)))


class AdaptedTrunk(nn.Module):
    """SAM2's Hiera, or a ``ConvTrunk``, with adapters."""

    def __init__(self, trunk: Any, adapters: EncoderAdapters) -> None:
        """Add adapters to ``trunk``."""
        super().__init__()
        self.trunk, self.adapters = trunk, adapters

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the trunk's levels (B, W, S/4, S/4), ... of pixels (B, 3, S, S), with adapters."""
        high, stages = self.adapters.pyramid(pixels), self.adapters.stages
        features = pixels  # of the present stage: (B, h, w, n)

        def prompted(i: int, x: Tensor) -> Tensor:
            nonlocal features
            if i == 0 or stages[i] != stages[i - 1]:
                features = self.adapters.patch[stages[i]](x) + high[stages[i]]
            return x + self.adapters.prompt(i, features)  # (B, h, w, W)

        if isinstance(self.trunk, ConvTrunk):
            return self.trunk(
                pixels, lambda i, x: prompted(i, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
            )
        # Repeats Hiera.forward.
        x = self.trunk.patch_embed(pixels)  # (B, h, w, W)
        x = x + self.trunk._get_pos_embed(x.shape[1:3])
        levels = []
        for i, block in enumerate(self.trunk.blocks):
            x = block(prompted(i, x))
            if i in self.trunk.stage_ends:
                levels.append(x.permute(0, 3, 1, 2))
        return levels


def inputs_of(trunk: Any) -> list[tuple[int, int]]:
    """Return the width and the stride of the input of each block of a trunk; see ``AdaptedTrunk``."""
    if isinstance(trunk, ConvTrunk):
        return trunk.inputs
    widths = sorted({block.dim for block in trunk.blocks})  # a stage halves the resolution of the previous
    first = trunk.patch_embed.proj.stride[0]
    return [(block.dim, first * 2 ** widths.index(block.dim)) for block in trunk.blocks]


def stages_of(inputs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Join runs of equal (width, stride) into stages: width, stride and number of blocks."""
    return [(*each, len(list(run))) for each, run in groupby(inputs)]


def high_frequencies(pixels: Tensor) -> Tensor:
    """Remove the low frequencies of pixels (B, C, H, W) and return absolute values (B, C, H, W).

    As in SAM-Adapter's "fft", a square in the centre of the spectrum, ``LOW_SHARE`` of its area, becomes 0.
    """
    height, width = pixels.shape[-2:]
    half = int((height * width * LOW_SHARE) ** 0.5 // 2)
    spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
    y, x = height // 2, width // 2
    keep = torch.ones(height, width, device=pixels.device)
    keep[y - half : y + half, x - half : x + half] = 0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1))).real.abs()


def with_adapters(model: Any, inner: Sequence[int], seed: int = 0) -> Any:
    """Copy SAM2 with untrained adapters of ``inner`` channels per stage; adapters and decoder can train."""
    model = copy.deepcopy(model)
    trunk = model.image_encoder.trunk
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = EncoderAdapters(inputs_of(trunk), inner)
    adapters.to(next(trunk.parameters()).device)
    model.image_encoder.trunk = AdaptedTrunk(trunk, adapters)
    model.sam_mask_decoder.requires_grad_(True)
    return model.eval()


def segment_pixels(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Predict SAM2's single mask of pixels (B, 3, S, S) without a prompt: logits (B, S/4, S/4), IoU (B,)."""
    *fine, embedding = model.forward_image(pixels)["backbone_fpn"]  # the last: (B, d, S/16, S/16)
    if model.directly_add_no_mem_embed:
        embedding = embedding + model.no_mem_embed.view(1, -1, 1, 1)
    sparse, dense = model.sam_prompt_encoder(points=None, boxes=None, masks=None)  # (1, 0, d), (1, d, h, w)
    count = len(pixels)
    logits, iou, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=embedding,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse.expand(count, -1, -1),
        dense_prompt_embeddings=dense.expand(count, -1, -1, -1),
        repeat_image=False,
        high_res_features=fine,
    )  # (B, 4, S/4, S/4), (B, 4): the single mask comes first
    return logits[:, 0], iou[:, 0]


def outline_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor) -> Tensor:
    """Add cross entropy and 1 - soft IoU (SAM-Adapter) and the squared error of the predicted IoU (SAM).

    ``logits`` are (B, h, w), ``predicted_iou`` (B,) and ``target`` (B, S, S) in [0, 1]. Returns a scalar.
    """
    full = F.interpolate(logits[:, None], target.shape[1:], mode="bilinear")[:, 0]  # (B, S, S)
    inside = full.sigmoid()
    both, either = (inside * target).sum((1, 2)), (inside + target - inside * target).sum((1, 2))
    with torch.no_grad():
        mask, truth = full > 0, target > 0.5
        shared, covered = (mask & truth).sum((1, 2)), (mask | truth).sum((1, 2))
        iou = shared / covered.clamp(min=1)  # (B,)
    entropy = F.binary_cross_entropy_with_logits(full, target)
    return entropy + (1 - both / either.clamp(min=1)).mean() + F.mse_loss(predicted_iou, iou)


def train_adapter(
    pairs: Pairs,
    plain: Sam2Segmenter,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    reduction: int,
    seed: int,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict[str, Tensor]:
    """Train adapters and a copy of the mask decoder on known regions; return the last step's state.

    Args:
        pairs: Training images and regions. Each draw reads a pair anew, so that a lazy sequence saves memory.
            Leave out images without a region: if only one class has such images, blank masks reveal it.
        plain: SAM2 to start from; training does not change it.
        steps: Steps of AdamW, with a cosine schedule from ``lr`` to 0.
        batch_size: Images per step. Every image is drawn once before any is drawn again.
        lr: Initial learning rate.
        weight_decay: Weight decay of AdamW.
        reduction: Divisor of the stages' widths inside the adapters.
        seed: Seed of the adapters' initial weights and of the order of the images.
        progress: Receives the number of steps since its last call, as ``tqdm.update`` does.

    Returns:
        Tensors on the CPU for ``AdapterSegmenter``, named "adapters..." and "decoder...".

    Raises:
        ValueError: There is no pair, a region is empty, or a number is out of range.
    """
    numbers = {"steps": steps, "batch_size": batch_size, "lr": lr, "reduction": reduction}
    if bad := [f"{name} is {value}" for name, value in numbers.items() if value <= 0]:
        raise ValueError(f"adapter: {', '.join(bad)}; use numbers above 0.")
    if len(pairs) == 0:
        raise ValueError("adapter: no image has a known region. Put some under masks/ in the images' folder.")
    stages = stages_of(inputs_of(plain.model.image_encoder.trunk))
    model = with_adapters(plain.model, [max(1, width // reduction) for width, _, _ in stages], seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        drawn, order = order[:batch_size], order[batch_size:]
        pixels, target = _batch([pairs[i] for i in drawn], plain)
        optimizer.zero_grad(set_to_none=True)
        outline_loss(*segment_pixels(model, pixels), target).backward()
        optimizer.step()
        schedule.step()
        progress(1)
    return _state(model)


def adapter_key(plain: Sam2Segmenter, pairs: str, settings: Mapping[str, object]) -> str:
    """Return the sha256 hex of a training on the pairs that ``pairs`` identifies, with these arguments."""
    return fingerprint(train_adapter, model=plain.features_key, pairs=pairs, **settings)


class AdapterSegmenter:
    """One mask per image from SAM2 with trained adapters, without a prompt. For one thread at a time.

    It runs the fallback ladder of ``Sam2Segmenter`` with one candidate; the plain SAM2 runs the last two
    rungs. Images with and without a known region are treated alike.
    """

    def __init__(self, plain: Sam2Segmenter, state: Mapping[str, Tensor]) -> None:
        """Add the adapters of ``state``, which ``train_adapter`` returned, to ``plain``.

        The strategy of ``plain`` has no effect. Raises ValueError if the state belongs to another SAM2.
        """
        self.sam2 = plain
        self.settings = plain.settings
        self.key = segmenter_key(AdapterSegmenter, plain=plain.key, state=weights.digest(state))
        self.model = _with_state(plain.model, state).requires_grad_(False)

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Segment images (H, W, 3) uint8 RGB of any sizes: one mask per image, in their order."""
        masks: list[Mask] = []
        with torch.inference_mode():
            for batch in self.sam2.batches(images):
                logits, iou = segment_pixels(self.model, self.sam2.pixels(batch))
                for i, image in enumerate(batch):
                    rung = self._rung(image, logits[i].float().cpu().numpy(), float(iou[i]))
                    masks.append(self.sam2.mask(image, rung))
        return masks

    @property
    def state(self) -> dict[str, Tensor]:
        """Return the state that ``train_adapter`` returned, on the CPU."""
        return _state(self.model)

    def _rung(self, image: np.ndarray, logits: np.ndarray, predicted_iou: float) -> Rung:
        """Run the ladder for one image with logits (h, w) and predicted IoU."""
        candidate = logits[None]  # (1, h, w)
        choice = None
        if np.isfinite(candidate).all() and np.isfinite(predicted_iou):
            quality, steady = np.array([predicted_iou]), candidates.stability(candidate)
            choice = candidates.choose(
                candidate > 0, quality, steady, self.settings.limits, keep=1, max_overlap=1.0
            )
        if choice is None:
            return self.sam2.box_rung(self.sam2.encode([image]), 0)
        return Rung(candidate, choice.score, choice.status)


def _with_state(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Copy SAM2 and load a state of ``train_adapter``. Raises ValueError if the state does not fit."""
    ups = [name for name in state if name.startswith("adapters.up.") and name.endswith(".weight")]
    inner = [state[name].shape[1] for name in sorted(ups, key=lambda name: int(name.split(".")[2]))]
    try:
        adapted = with_adapters(model, inner)
        for part, prefix in zip(_trained_parts(adapted), ("adapters.", "decoder."), strict=True):
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
    except (RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split())[:200]
        raise ValueError(
            f"The adapter's {len(state)} tensors belong to another SAM2 ({fault} ...). Run the masks stage, "
            "which trains an adapter for the present masks.config."
        ) from error
    return adapted


def _state(model: Any) -> dict[str, Tensor]:
    """Return copies of the trained tensors on the CPU, named for safetensors."""
    state: dict[str, Tensor] = {}
    for prefix, part in zip(("adapters.", "decoder."), _trained_parts(model), strict=True):
        state |= {prefix + name: value for name, value in part.state_dict().items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _trained_parts(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.image_encoder.trunk.adapters, model.sam_mask_decoder


def _batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], plain: Sam2Segmenter) -> tuple[Tensor, Tensor]:
    """Return pixels (B, 3, S, S) of pairs, and the share of each pixel inside the region (B, S, S)."""
    for image, region in pairs:
        if region.shape != image.shape[:2] or not region.any():
            fault = "is empty" if region.shape == image.shape[:2] else f"has shape {region.shape}"
            raise ValueError(
                f"adapter: the region of an image of {image.shape[:2]} {fault}. Use regions of the image's "
                "size and leave out images without one, because blank masks can reveal a class."
            )
    pixels = plain.pixels([check_image(image) for image, _ in pairs])
    size = pixels.shape[-2:]
    targets = [
        F.interpolate(torch.from_numpy(region)[None, None].float(), size, mode="area")[0, 0]
        for _, region in pairs
    ]
    return pixels, torch.stack(targets).to(pixels.device)
