"""CLIP through open_clip: images and texts become features, the end of the image encoder trainable."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from medfocus.clip.regions import REGIONS, class_token_bias, pack, patch_coverage, with_alpha
from medfocus.clip.tokenizer import CONFIGS, pocket_tokenizer
from medfocus.clip.vit import ActivationCache, Tail, as_vit, heads, pooled
from medfocus.storage import weights

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

_POCKET = "clip_pocket"  # its name in open_clip's registry: the stem of its configuration file
_TEXT_BATCH = 256  # texts a pass; bounds the memory that a thousand classes take
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in order of preference


class Describer(Protocol):
    """A segmenter that knows more of an image than its mask."""

    features_key: str  # sha256 hex of its weights and code: equal keys describe equally

    def describe(self, images: Sequence[np.ndarray], grid: int) -> Tensor:
        """Images (H, W, 3) uint8 RGB -> its image features on ``grid`` x ``grid`` cells, (B, P)."""
        ...


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A frozen CLIP on one device: both towers, its tokenizer, and what its images have to look like."""

    name: str  # as the user gave it
    key: str  # sha256 of weights and configuration; names the features in caches
    config: dict[str, Any]  # what open_clip reads as open_clip_config.json to build the model again
    model: nn.Module  # open_clip's, frozen, in eval mode
    tokenizer: Any  # list of texts -> (N, context) int64
    dim: int  # D, of the space that images and texts share
    image_size: int  # S, pixels a side
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    logit_scale: float  # s, after the exponential: logits = s * I @ T.T
    device: torch.device
    segmenter: Describer | None = None  # whose image features may stand beside CLIP's
    region: str | None = None  # one of REGIONS: what the channels behind RGB are taken for; None: nothing
    attention_bias: float = 0.0  # β of the region "attention"
    last: ActivationCache | None = None  # what is remembered of the last batch; None: nothing

    def with_activation_cache(self) -> ClipEncoder:
        """The same towers, which a batch passes once, however many kinds of features are asked of it.

        That goes for calls one after the other with the very same tensor of views. In "dual" nothing is
        remembered.
        """
        return replace(self, last=ActivationCache())

    def with_segmenter(self, segmenter: Describer) -> ClipEncoder:
        """The same towers with a segmenter's image features at hand, under a key that names both."""
        key = hashlib.sha256(f"{self.key} {segmenter.features_key}".encode()).hexdigest()
        return replace(self, key=key, segmenter=segmenter)

    def with_region(self, region: str, attention_bias: float) -> ClipEncoder:
        """The same towers with an eye for a region in the views' further channels, under another key.

        Args:
            region: One of REGIONS; ``medfocus.focus.region_views.region_view`` makes the views.
            attention_bias: β, what a patch inside the region gains in the class token's attention logits in
                every block; of "attention" alone. At 0 the features are those without a region, bit by bit.

        Raises ValueError for another region, or one that needs a ViT where the image encoder is none.
        """
        if region not in REGIONS:
            raise ValueError(f"region {region!r} is not known; use one of {', '.join(REGIONS)}.")
        if region != "dual":
            self._cut(1)
        key = f"{self.key} {region} {attention_bias if region == 'attention' else 0.0}"
        return replace(
            self,
            key=hashlib.sha256(key.encode()).hexdigest(),
            model=with_alpha(self.model) if region == "alpha" else self.model,
            region=region,
            attention_bias=attention_bias,
        )

    def describe(self, views: np.ndarray | Tensor, grid: int) -> Tensor:
        """Views (B, S, S, C) uint8 -> the segmenter's features on ``grid`` x ``grid`` cells, (B, P).

        Raises ValueError where there is no segmenter that has any.
        """
        if self.segmenter is None:
            raise ValueError(
                f"{self.name}: segmenter_grid is {grid}, but no segmenter with image features stands "
                "beside it. Set masks.segmenter to sam2, or segmenter_grid to 0."
            )
        last = self.last or ActivationCache()
        last.turn_to(views)
        if grid not in last.described:
            images = list(np.ascontiguousarray(np.asarray(views)[..., :3]))
            last.described[grid] = self.segmenter.describe(images, grid).to(self.device)
        return last.described[grid]

    def preprocess(self, views: np.ndarray | Tensor) -> Tensor:
        """Views (B, S, S, C) uint8 -> pixels (B, C, S, S) float32 on the device.

        RGB is normalised, in "dual" twice; a fourth channel, the region, comes out in [0, 1].
        """
        last = self.last or ActivationCache()
        last.turn_to(views)
        if last.pixels is None:
            last.pixels = self._normalised(views)
        return last.pixels

    def _normalised(self, views: np.ndarray | Tensor) -> Tensor:
        pixels = torch.as_tensor(views).to(self.device).permute(0, 3, 1, 2)  # (B, C, S, S)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255
        mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
        if pixels.shape[1] == 4:
            return torch.cat([(pixels[:, :3] - mean) / std, pixels[:, 3:]], dim=1)
        return torch.cat([(part - mean) / std for part in pixels.split(3, dim=1)], dim=1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, S, S) -> image features (B, D), each of length one."""
        visual = as_vit(self.model.visual)
        if self.last and self.region != "dual" and visual is not None:
            deepest = len(visual.transformer.resblocks)
            return pooled(visual, self._tokens(pixels, {deepest})[deepest])
        return self.image_features(pixels)

    def image_features(self, pixels: Tensor) -> Tensor:
        """``encode_images`` with a gradient, for a copy of the model that trains."""
        pixels = pixels.to(self.device)
        if self.region == "dual":
            raw, focused = (self._plain.image_features(half) for half in pixels.split(3, dim=1))
            return normalize(raw + focused, dim=-1)
        if self.region == "attention" and self.attention_bias:
            visual, _ = self._cut(1)
            tokens, bias = visual._embeds(pixels[:, :3]), self._bias(pixels)
            for block in visual.transformer.resblocks:
                tokens = block(tokens, attn_mask=bias)
            return pooled(visual, tokens)
        seen = pixels if self.region == "alpha" else pixels[:, :3]
        return self.model.encode_image(seen, normalize=True)  # pyright: ignore[reportCallIssue]

    @property
    def _plain(self) -> ClipEncoder:
        return replace(self, region=None, last=None)

    def _bias(self, pixels: Tensor) -> Tensor | None:
        """For every block's attention logits (B * heads, L, L); None where there is nothing to add."""
        if self.region != "attention" or not self.attention_bias:
            return None
        visual, _ = self._cut(1)
        coverage = patch_coverage(pixels[:, 3:].to(self.device), visual.conv1.kernel_size[0])
        return class_token_bias(coverage, self.attention_bias, heads(visual))

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts (N) -> text features (N, D), each of length one.

        Raises ValueError for a text that the tokenizer would cut off: two classes could then read the same.
        """
        from open_clip import SimpleTokenizer

        if isinstance(self.tokenizer, SimpleTokenizer):
            room = (self.tokenizer.context_length or 0) - 2  # without the tokens that open and close a text
            for text in texts:
                if (count := len(self.tokenizer.encode(text))) > room:
                    raise ValueError(
                        f"the prompt '{text}' has {count} tokens, and {self.name} reads at most {room}. "
                        "Shorten the template or the class name."
                    )
        tokens = self.tokenizer(texts).to(self.device)  # (N, context)
        parts = [self.model.encode_text(part, normalize=True) for part in tokens.split(_TEXT_BATCH)]  # pyright: ignore[reportCallIssue]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_layers(self, pixels: Tensor, layers: tuple[int, ...], grid: int) -> Tensor:
        """Pixels (B, C, S, S) -> image features, and behind them the patches of ``layers``: (B, D + P).

        Layer 0 is the embedding, layer n what block n gives; its patches are averaged to ``grid`` x ``grid``
        cells of W numbers, in "dual" over both images. Raises ValueError as ``trunk`` does, or for a layer
        or grid that is not there.
        """
        if self.region == "dual":
            both = [self._plain.encode_layers(half, layers, grid) for half in pixels.split(3, dim=1)]
            merged = torch.stack(both).mean(dim=0)
            return torch.cat([normalize(merged[:, : self.dim], dim=-1), merged[:, self.dim :]], dim=1)
        visual, _ = self._cut(1)
        last, side = len(visual.transformer.resblocks), visual.grid_size[0]
        if not set(layers) <= set(range(last + 1)) or not 1 <= grid <= side:
            raise ValueError(
                f"{self.name}: patch features of layers {list(layers)} on {grid} x {grid} cells; its image "
                f"encoder has layers 0 to {last} and {side} x {side} patches."
            )
        tokens = self._tokens(pixels, {*layers, last})
        patches = (tokens[layer][:, 1:].mT.unflatten(2, visual.grid_size) for layer in sorted(set(layers)))
        parts = [adaptive_avg_pool2d(part, grid).flatten(1) for part in patches]  # of (B, W, G, G)
        return torch.cat([pooled(visual, tokens[last]), *parts], dim=1)

    @torch.no_grad()
    def trunk(self, pixels: Tensor, blocks: int) -> Tensor:
        """Pixels (B, C, S, S) -> what enters the last ``blocks`` blocks of the tower, for ``tail``.

        They are tokens (B, L, W); in "dual" those of both images (B, 2 L, W); in "attention" one more
        (B, L + 1, W) that carries the region's coverage.
        Raises ValueError when the tower is not open_clip's VisionTransformer or has not that many blocks.
        """
        if self.region == "dual":
            return torch.cat([self._plain.trunk(half, blocks) for half in pixels.split(3, dim=1)], dim=1)
        visual, cut = self._cut(blocks)
        tokens = self._tokens(pixels, {cut})[cut]
        if self._bias(pixels) is None:
            return tokens
        return pack(tokens, patch_coverage(pixels[:, 3:].to(self.device), visual.conv1.kernel_size[0]))

    def _tokens(self, pixels: Tensor, places: set[int]) -> dict[int, Tensor]:
        """Tokens (B, L, W) at places of the tower, at least the wanted ones; see ``ActivationCache``."""
        last = self.last or ActivationCache()
        last.places |= places
        if last.pixels is not pixels or not places <= last.tokens.keys():
            visual, _ = self._cut(1)
            seen = (pixels if self.region == "alpha" else pixels[:, :3]).to(self.device)
            tokens, bias = visual._embeds(seen), self._bias(pixels)
            last.pixels, last.tokens = pixels, {0: tokens} if 0 in last.places else {}
            for place in range(1, max(last.places) + 1):
                # batch first: VisionTransformer knows no other way
                tokens = visual.transformer.resblocks[place - 1](tokens, attn_mask=bias)
                if place in last.places:
                    last.tokens[place] = tokens
        return last.tokens

    def tail(self, blocks: int) -> nn.Module:
        """A trainable copy of the tower's last ``blocks`` blocks and its projection: (B, L, W) -> (B, D).

        ``tail(n)(trunk(x, n))`` is ``encode_images(x)`` until the copy is trained. Raises as ``trunk`` does.
        """
        visual, cut = self._cut(blocks)
        embedding = ("conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre")
        unused = [*(getattr(visual, name) for name in embedding), *visual.transformer.resblocks[:cut]]
        memo = {
            id(part): part for part in unused
        }  # shared with the copy, not copied, and then taken out of it
        tower = copy.deepcopy(visual, memo)
        for name in embedding:
            setattr(tower, name, None)
        tower.transformer.resblocks = tower.transformer.resblocks[cut:]
        biased = self.region == "attention" and self.attention_bias != 0
        return Tail(
            tower,
            images=2 if self.region == "dual" else 1,
            attention_bias=self.attention_bias if biased else None,
        ).requires_grad_(True)

    def _cut(self, blocks: int) -> tuple[VisionTransformer, int]:
        """The image encoder and the index of its first block that is fine-tuned."""
        visual = as_vit(self.model.visual)
        if visual is None:
            raise ValueError(
                f"{self.name}: its image encoder is {type(self.model.visual).__name__}, not open_clip's "
                "VisionTransformer, so its last blocks cannot be fine-tuned. Take a ViT such as ViT-B-32, or "
                "a method that leaves the tower as it is."
            )
        layers = len(visual.transformer.resblocks)
        if not 1 <= blocks <= layers:
            raise ValueError(
                f"{self.name}: {blocks} blocks to fine-tune; its image encoder has 1 to {layers}."
            )
        return visual, layers - blocks


def build_clip(model: str, pretrained: str, device: str | torch.device = "cpu") -> ClipEncoder:
    """Build a frozen CLIP.

    Args:
        model: "pocket", a model name of open_clip, or "hf-hub:ORG/NAME" or "local-dir:FOLDER" with an
            open_clip_config.json, which bring their own weights.
        pretrained: A checkpoint path, a pretrained tag of the model, or "random:SEED"; for the model "pocket"
            also "pocket", the weights in this package; empty for "hf-hub:" and "local-dir:".
        device: Where both towers live.

    Raises FileNotFoundError when the weights are nowhere, before anything is built; ValueError for an
    unknown model or tag, a refused or unfitting checkpoint, or a model whose images are not square;
    ImportError when the text tower needs a package that is absent.
    """
    name, checkpoint, options = _locate(model, pretrained)
    if checkpoint:
        weights.load(checkpoint)  # a refused or damaged file fails here, in one sentence

    import open_clip

    config = open_clip.get_model_config(name) or {}
    _check_text_tower(model, config.get("text_cfg", {}))
    try:
        with torch.random.fork_rng(devices=[]), _without_random_weights_warning():
            torch.manual_seed(int(pretrained.removeprefix("random:")) if checkpoint is None else 0)
            built: Any = open_clip.create_model(
                name,
                pretrained=None if checkpoint is None or name.startswith("local-dir:") else str(checkpoint),
                require_pretrained=checkpoint is not None,
                pretrained_text=False,
                device=device,
                **options,
            )
    except (RuntimeError, AssertionError, KeyError) as error:  # of weights for another architecture
        if checkpoint is None:
            raise
        fault = " ".join(str(error).split())[:200]
        raise ValueError(
            f"CLIP {model}: the weights in {checkpoint} do not fit it ({fault} ...). Set clip.model to what "
            "they were trained as."
        ) from error
    built.eval().requires_grad_(False)

    preprocess = built.visual.preprocess_cfg
    size = built.visual.image_size  # an int in ResNets, else (S, S)
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise ValueError(
                f"CLIP {model} sees {size[0]} x {size[1]} pixels. Choose a model that sees squares."
            )
        size = size[0]
    pocket = model == "pocket"
    tokenizer = pocket_tokenizer() if pocket else open_clip.get_tokenizer(_tokenizer_name(model))
    settings = {"config": config, "options": options, "preprocess": preprocess}
    identity = weights.digest(built.state_dict()) + json.dumps(settings, sort_keys=True)
    return ClipEncoder(
        name=model,
        key=hashlib.sha256(identity.encode()).hexdigest(),
        config={"model_cfg": _as_built(config, built), "preprocess_cfg": dict(preprocess)},
        model=built,
        tokenizer=tokenizer,
        dim=config["embed_dim"],
        image_size=size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        logit_scale=float(built.logit_scale.exp()),
        device=torch.device(device),
    )


def _as_built(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The architecture with the QuickGELU that a pretrained tag asks for and its configuration does not."""
    from open_clip.transformer import QuickGELU

    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    return {**config, "quick_gelu": True} if quick else dict(config)


@contextlib.contextmanager
def _without_random_weights_warning() -> Iterator[None]:
    """open_clip warns on the root logger of random weights, which here are always asked for by name."""

    def wanted(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)


def _locate(model: str, pretrained: str) -> tuple[str, Path | None, dict[str, Any]]:
    """The model's name for open_clip, its checkpoint (None: random weights), and what its tag asks for."""
    if model.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise ValueError(
                f"CLIP {model} brings its own weights. Leave clip.pretrained ('{pretrained}') empty."
            )
        return _locate_folder(model)
    what = f"CLIP {model} (clip.pretrained)"
    if model == pretrained == "pocket":
        pretrained = str(CONFIGS.parent / "data" / f"{_POCKET}.safetensors")
    if re.fullmatch(r"random:\d+", pretrained):
        return _registered(model), None, {}
    if "." in pretrained or "/" in pretrained or os.sep in pretrained:  # no tag has these
        checkpoint = weights.resolve(pretrained, hub_id=None, filename=None, what=what)
        return _registered(model), checkpoint, {}

    name = _registered(model)
    import open_clip

    tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{what}: '{pretrained}' is no tag of this model (it has: {known}). Give one of them, a path "
            "to a checkpoint, or random:SEED."
        )
    hub_id, filename = os.path.split(tag["hf_hub"])
    files = (f"{Path(filename).stem}.safetensors", filename) if filename else _HUB_FILES
    options = {
        "force_quick_gelu": tag.get("quick_gelu", False),  # open_clip only warns when a tag needs it
        "force_preprocess_cfg": {part: tag[part] for part in ("mean", "std", "interpolation", "resize_mode")},
    }
    return name, weights.resolve(pretrained, hub_id=hub_id, filename=files, what=what), options


def _locate_folder(model: str) -> tuple[str, Path, dict[str, Any]]:
    """As ``_locate``, for a model that is a folder of configuration and weights, on the hub or here."""
    scheme, _, place = model.partition(":")
    what = f"CLIP {model} (clip.model; local-dir:FOLDER takes a folder with its weights and configuration)"
    if scheme == "hf-hub":
        checkpoint = weights.resolve(place, hub_id=place, filename=_HUB_FILES, what=what)
        config = weights.resolve(place, hub_id=place, filename="open_clip_config.json", what=what)
    else:
        folder = Path(place).expanduser()
        present = [name for name in _HUB_FILES if (folder / name).is_file()]
        file = str(folder / (present or _HUB_FILES)[0])
        checkpoint = weights.resolve(file, hub_id=None, filename=None, what=what)
        config = weights.resolve(str(folder / "open_clip_config.json"), hub_id=None, filename=None, what=what)
    return f"local-dir:{config.parent}", checkpoint, {}


def _registered(model: str) -> str:
    """The model's name in open_clip's registry, into which the pocket model is put first."""
    import open_clip

    if model == "pocket":
        if _POCKET not in open_clip.list_models():
            open_clip.add_model_config(CONFIGS / f"{_POCKET}.json")
        return _POCKET
    name = _tokenizer_name(model)
    if open_clip.get_model_config(name) is None:
        near = ", ".join(difflib.get_close_matches(name, ["pocket", *open_clip.list_models()], cutoff=0.4))
        raise ValueError(
            f"clip.model: open_clip has no model '{model}' (near it: {near or 'nothing'}). Give a name that "
            "open_clip.list_models() has, pocket, or an hf-hub: id."
        )
    return name


def _tokenizer_name(model: str) -> str:
    """OpenAI's spelling ViT-B/32 is open_clip's ViT-B-32; a place keeps its slashes."""
    return model if ":" in model else model.replace("/", "-")


def _check_text_tower(model: str, text: dict[str, Any]) -> None:
    needed = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if "siglip" in model.lower():
        needed = needed or "a SigLIP tokenizer"
    if needed and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"CLIP {model}: its text tower ({needed}) needs the package transformers. Run `pip install "
            "transformers`, or choose a model with CLIP's own text tower."
        )
