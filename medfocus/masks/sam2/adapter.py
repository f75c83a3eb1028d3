"""SAM2 with adapters that were taught on known regions: SAM-Adapter, arXiv 2304.09148.

Before each block of the Hiera encoder its stage's stream gains P_i = MLP_up(GELU(MLP_i(F_patch + F_hfc))):
F_patch is the stream where it enters the stage, F_hfc the embedded high frequencies of the image, both
narrowed; MLP_i is the block's own, MLP_up its stage's. The stages are those of the authors' SAM2 version
(arXiv 2408.04579), blocks of the same width at their entrance. The encoder stays frozen, adapters and mask
decoder train. MLP_up starts at 0, so that training starts from SAM2 itself [ours].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfocus.masks import candidates
from medfocus.masks.sam2.segmenter import Found, Sam2Segmenter
from medfocus.masks.segmenter import Mask, check_image, segmenter_key
from medfocus.storage import weights
from medfocus.storage.fingerprint import fingerprint

LOW_SHARE = 0.25  # of the spectrum's area: the low frequencies that F_hfc lacks, as in the authors' code


class Pairs(Protocol):
    """Images (H, W, 3) uint8 RGB of any sizes with their regions (H, W) bool; a list of them, or lazier."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


class Adapters(nn.Module):
    """P_i of every block."""

    def __init__(self, widths: Sequence[int], inner: Sequence[int]) -> None:
        """``widths``: of each block's entrance, in their order; ``inner``: of each stage's narrow MLPs."""
        super().__init__()
        stages = sorted(set(widths))  # a stage is wider than the one before
        self.stages = [stages.index(width) for width in widths]  # of each block
        # The image's high frequencies at a quarter of its sides, an eighth, ...
        self.high = nn.ModuleList(
            nn.Conv2d(3, n, 7, stride=4, padding=3)
            if i == 0
            else nn.Conv2d(inner[i - 1], n, 3, stride=2, padding=1)
            for i, n in enumerate(inner)
        )
        self.patch = nn.ModuleList(nn.Linear(w, n) for w, n in zip(stages, inner, strict=True))
        self.tune = nn.ModuleList(nn.Linear(inner[stage], inner[stage]) for stage in self.stages)
        self.up = nn.ModuleList(nn.Linear(n, w) for w, n in zip(stages, inner, strict=True))
        for up in cast("Iterator[nn.Linear]", iter(self.up)):
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Pixels (B, 3, S, S) -> F_hfc of each stage, (B, S/4, S/4, n), (B, S/8, S/8, n'), ..."""
        level, levels = high_frequencies(pixels), []
        for embed in self.high:
            level = embed(level)
            levels.append(level.permute(0, 2, 3, 1))
        return levels

    def prompt(self, block: int, features: Tensor) -> Tensor:
        """F_patch + F_hfc of a block's stage (B, h, w, n) -> P_i (B, h, w, W)."""
        return self.up[self.stages[block]](F.gelu(self.tune[block](features)))


class AdaptedTrunk(nn.Module):
    """SAM2's Hiera with adapters: pixels (B, 3, S, S) -> its levels (B, W, S/4, S/4) and so on."""

    def __init__(self, trunk: Any, adapters: Adapters) -> None:
        """``trunk``: the sam2 package's ``Hiera``, whose own ``forward`` this one repeats."""
        super().__init__()
        self.trunk, self.adapters = trunk, adapters

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """See the class."""
        x = self.trunk.patch_embed(pixels)  # (B, h, w, W)
        x = x + self.trunk._get_pos_embed(x.shape[1:3])
        high, stages = self.adapters.pyramid(pixels), self.adapters.stages
        features, levels = x, []
        for i, block in enumerate(self.trunk.blocks):
            if i == 0 or stages[i] != stages[i - 1]:
                features = self.adapters.patch[stages[i]](x) + high[stages[i]]  # (B, h, w, n)
            x = block(x + self.adapters.prompt(i, features))
            if i in self.trunk.stage_ends:
                levels.append(x.permute(0, 3, 1, 2))
        return levels


def high_frequencies(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) -> the absolute value of what low frequencies do not explain, (B, C, H, W).

    SAM-Adapter's "fft": a square around the spectrum's centre, ``LOW_SHARE`` of its area, is set to 0.
    """
    height, width = pixels.shape[-2:]
    half = int((height * width * LOW_SHARE) ** 0.5 // 2)
    spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
    y, x = height // 2, width // 2
    keep = torch.ones(height, width, device=pixels.device)
    keep[y - half : y + half, x - half : x + half] = 0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1))).real.abs()


def adapted(model: Any, inner: Sequence[int], seed: int = 0) -> Any:
    """A copy of a SAM2 with untrained adapters, ``inner`` wide a stage: only they and its decoder train."""
    model = copy.deepcopy(model)
    trunk = model.image_encoder.trunk
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = Adapters([block.dim for block in trunk.blocks], inner)
    adapters.to(next(trunk.parameters()).device)
    model.image_encoder.trunk = AdaptedTrunk(trunk, adapters)
    model.sam_mask_decoder.requires_grad_(True)
    return model.eval()


def whole_image(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """SAM2's single mask for no prompt. Pixels (B, 3, S, S) -> logits (B, S/4, S/4), predicted IoU (B,)."""
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
    )  # (B, 4, S/4, S/4), (B, 4): the first is the single mask's
    return logits[:, 0], iou[:, 0]


def outline_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor) -> Tensor:
    """SAM-Adapter's cross entropy + (1 - soft IoU), and SAM's error of the predicted IoU -> scalar.

    ``logits`` (B, h, w), ``predicted_iou`` (B,), ``target`` (B, S, S) in [0, 1].
    """
    full = F.interpolate(logits[:, None], target.shape[1:], mode="bilinear")[:, 0]  # (B, S, S)
    inside = full.sigmoid()
    both, either = (inside * target).sum((1, 2)), (inside + target - inside * target).sum((1, 2))
    with torch.no_grad():
        found, truth = full > 0, target > 0.5
        shared, covered = (found & truth).sum((1, 2)), (found | truth).sum((1, 2))
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
    """Teach adapters and a copy of the mask decoder known regions; the last iterate is kept.

    Args:
        pairs: Asked for again whenever they are drawn, so that reading files then costs no memory. An
            image without a region has no place here: where only one class has none, blank masks would
            tell it.
        plain: The SAM2 to start from; it stays as it is.
        steps: Of AdamW, on a cosine from ``lr`` to 0.
        batch_size: Images a step; every image is drawn once before any is drawn again.
        lr: Learning rate at the start.
        weight_decay: AdamW's.
        reduction: What the widths of the encoder's stages are divided by inside the adapters.
        seed: Of the adapters' first weights and the order of the images.
        progress: Called with the number of steps done since its last call, as ``tqdm.update`` takes it.

    Returns:
        Tensors on the CPU for ``AdapterSegmenter``, their names "adapters..." and "decoder...".

    Raises:
        ValueError: There is no pair, a region is empty, or a number is out of range.
    """
    numbers = {"steps": steps, "batch_size": batch_size, "lr": lr, "reduction": reduction}
    if bad := [f"{name} is {value}" for name, value in numbers.items() if value <= 0]:
        raise ValueError(f"adapter: {', '.join(bad)}; use numbers above 0.")
    if len(pairs) == 0:
        raise ValueError("adapter: no image has a known region; put some under masks/ beside the images.")
    trunk: Any = plain.model.image_encoder.trunk
    widths = sorted({block.dim for block in trunk.blocks})
    model = adapted(plain.model, [max(1, width // reduction) for width in widths], seed)
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
        outline_loss(*whole_image(model, pixels), target).backward()
        optimizer.step()
        schedule.step()
        progress(1)
    return _state(model)


def adapter_key(plain: Sam2Segmenter, pairs: str, settings: Mapping[str, object]) -> str:
    """sha256 hex: equal keys teach equally. ``pairs`` names them, ``settings`` are ``train_adapter``'s."""
    return fingerprint(train_adapter, model=plain.features_key, pairs=pairs, **settings)


class AdapterSegmenter:
    """One mask per image from a taught SAM2, without any prompt, after the others' ladder.

    The mask within the limits (status "chosen"), else within relaxed ones ("relaxed"), else what SAM2 as it
    was makes of the box around the image ("box"), else the whole image ("identity"). Every image,
    with or without a known region, is treated the same. For one thread at a time.
    """

    def __init__(self, plain: Sam2Segmenter, state: Mapping[str, Tensor]) -> None:
        """Take limits and edges of ``plain``, whose strategy does not matter; ``state`` of ``train_adapter``.

        Raises ValueError where the state is not of this SAM2.
        """
        self.sam2 = plain
        self.settings = plain.settings
        self.key = segmenter_key(AdapterSegmenter, plain=plain.key, state=weights.digest(state))
        self.model = _with_state(plain.model, state).requires_grad_(False)

    def segment(self, images: Sequence[np.ndarray]) -> list[Mask]:
        """Images, (H, W, 3) uint8 RGB each and of any sizes -> one mask each, in their order."""
        masks: list[Mask] = []
        size = self.sam2.batch_size
        with torch.inference_mode():
            for start in range(0, len(images), size):
                batch = [check_image(image) for image in images[start : start + size]]
                logits, iou = whole_image(self.model, _pixels(batch, self.sam2))
                for i, image in enumerate(batch):
                    found = self._found(image, logits[i].float().cpu().numpy(), float(iou[i]))
                    masks.append(self.sam2._mask(image, found))
        return masks

    @property
    def state(self) -> dict[str, Tensor]:
        """What ``train_adapter`` gave, on the CPU."""
        return _state(self.model)

    def _found(self, image: np.ndarray, logits: np.ndarray, predicted_iou: float) -> Found:
        """The ladder for one image and its logits (h, w), up to the box around the whole of it."""
        one = logits[None]  # (1, h, w)
        choice = None
        if np.isfinite(one).all() and np.isfinite(predicted_iou):
            quality, steady = np.array([predicted_iou]), candidates.stability(one)
            choice = candidates.choose(
                one > 0, quality, steady, self.settings.limits, keep=1, max_overlap=1.0
            )
        if choice is None:
            return self.sam2._boxed(self.sam2.encode([image]), 0)
        return Found(one, choice.score, choice.status)


def _with_state(model: Any, state: Mapping[str, Tensor]) -> Any:
    """A copy of SAM2 with what ``train_adapter`` taught. Raises ValueError where it does not fit."""
    ups = [name for name in state if name.startswith("adapters.up.") and name.endswith(".weight")]
    inner = [state[f"adapters.up.{i}.weight"].shape[1] for i in range(len(ups))]
    try:
        made = adapted(model, inner)
        for part, prefix in zip(_taught_parts(made), ("adapters.", "decoder."), strict=True):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            part.load_state_dict(own)
    except (RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the adapter's {len(state)} tensors are of another SAM2 ({fault} ...). Run the masks stage, "
            "which teaches one for the present masks.config."
        ) from error
    return made


def _state(model: Any) -> dict[str, Tensor]:
    """Copies on the CPU of all that was taught, by names that safetensors takes."""
    state: dict[str, Tensor] = {}
    for prefix, part in zip(("adapters.", "decoder."), _taught_parts(model), strict=True):
        state |= {prefix + name: value for name, value in part.state_dict().items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _taught_parts(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.image_encoder.trunk.adapters, model.sam_mask_decoder


def _pixels(images: Sequence[np.ndarray], plain: Sam2Segmenter) -> Tensor:
    """Images of any sizes as SAM2's own transforms give them to it: (B, 3, S, S)."""
    return plain.predictor._transforms.forward_batch(list(images)).to(plain.predictor.device)


def _batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], plain: Sam2Segmenter) -> tuple[Tensor, Tensor]:
    """Pairs -> pixels (B, 3, S, S) and shares of a pixel inside the region (B, S, S)."""
    for image, region in pairs:
        if region.shape != image.shape[:2] or not region.any():
            what = "empty" if region.shape == image.shape[:2] else f"of {region.shape}"
            raise ValueError(
                f"adapter: the region of an image of {image.shape[:2]} is {what}; give a region of the "
                "image's size, and leave images without one out: blank masks can tell a class."
            )
    pixels = _pixels([check_image(image) for image, _ in pairs], plain)
    size = pixels.shape[-2:]
    targets = [
        F.interpolate(torch.from_numpy(region)[None, None].float(), size, mode="area")[0, 0]
        for _, region in pairs
    ]
    return pixels, torch.stack(targets).to(pixels.device)
