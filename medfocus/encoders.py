"""CLIP through open_clip: pictures and texts become features, the end of the picture tower trainable."""

from __future__ import annotations

import contextlib
import copy
import difflib
import gzip
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from medfocus import weights

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer
    from open_clip.transformer import VisionTransformer

CONFIGS = Path(__file__).parent / "configs"
_POCKET = "clip_pocket"  # its name in open_clip's registry: the stem of its configuration file
_TEXT_BATCH = 256  # texts a pass; bounds the memory that a thousand classes take
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in order of preference


class Describer(Protocol):
    """A segmenter that knows more of a picture than its mask."""

    features_key: str  # sha256 hex of its weights and code: equal keys describe equally

    def describe(self, pictures: Sequence[np.ndarray], grid: int) -> Tensor:
        """Pictures (H, W, 3) uint8 RGB -> its picture features on ``grid`` x ``grid`` cells, (B, P)."""
        ...


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A frozen CLIP on one device: both towers, its tokenizer, and what its pictures have to look like."""

    name: str  # as the user gave it
    key: str  # sha256 of weights and configuration; names the features in caches
    config: dict[str, Any]  # what open_clip reads as open_clip_config.json to build the model again
    model: nn.Module  # open_clip's, frozen, in eval mode
    tokenizer: Any  # list of texts -> (N, context) int64
    dim: int  # D, of the space that pictures and texts share
    image_size: int  # S, pixels a side
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    logit_scale: float  # s, after the exponential: logits = s * I @ T.T
    device: torch.device
    segmenter: Describer | None = None  # whose picture features may stand beside CLIP's

    def beside(self, segmenter: Describer) -> ClipEncoder:
        """The same towers with a segmenter's picture features at hand, under a key that names both."""
        key = hashlib.sha256(f"{self.key} {segmenter.features_key}".encode()).hexdigest()
        return replace(self, key=key, segmenter=segmenter)

    def describe(self, views: np.ndarray | Tensor, grid: int) -> Tensor:
        """Views (B, S, S, 3) uint8 RGB -> the segmenter's features on ``grid`` x ``grid`` cells, (B, P).

        Raises ValueError where there is no segmenter that has any.
        """
        if self.segmenter is None:
            raise ValueError(
                f"{self.name}: segmenter_grid is {grid}, but no segmenter with picture features stands "
                "beside it. Set masks.segmenter to sam2, or segmenter_grid to 0."
            )
        return self.segmenter.describe(list(np.asarray(views)), grid).to(self.device)

    def preprocess(self, views: np.ndarray | Tensor) -> Tensor:
        """Views (B, S, S, 3) uint8 RGB -> pixels (B, 3, S, S) float32, normalised, on the device."""
        pixels = torch.as_tensor(views).to(self.device).permute(0, 3, 1, 2)  # (B, 3, S, S)
        mean = torch.tensor(self.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(3, 1, 1)
        return (pixels.to(torch.float32, memory_format=torch.contiguous_format) / 255 - mean) / std

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> image features (B, D), each of length one."""
        return self.model.encode_image(pixels.to(self.device), normalize=True)  # pyright: ignore[reportCallIssue]

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
        """Pixels (B, 3, S, S) -> image features, and behind them the patches of ``layers``: (B, D + P).

        Layer 0 is the embedding, layer n what block n gives; its patches are averaged to ``grid`` x ``grid``
        cells of W numbers. Raises ValueError as ``trunk`` does, or for a layer or grid that is not there.
        """
        visual, _ = self._cut(1)
        last, side = len(visual.transformer.resblocks), visual.grid_size[0]
        if not set(layers) <= set(range(last + 1)) or not 1 <= grid <= side:
            raise ValueError(
                f"{self.name}: patch features of layers {list(layers)} on {grid} x {grid} cells; its picture "
                f"tower has layers 0 to {last} and {side} x {side} patches."
            )
        tokens = visual._embeds(pixels.to(self.device))  # (B, 1 + L, W)
        parts = []
        for layer in range(last + 1):
            if layer:
                tokens = visual.transformer.resblocks[layer - 1](tokens)
            if layer in layers:
                patches = tokens[:, 1:].mT.unflatten(2, visual.grid_size)  # (B, W, G, G)
                parts.append(adaptive_avg_pool2d(patches, grid).flatten(1))
        pooled, _ = visual._pool(tokens)
        assert visual.proj is not None  # only open_clip's pruned towers have none
        return torch.cat([normalize(pooled @ visual.proj, dim=-1), *parts], dim=1)

    @torch.no_grad()
    def trunk(self, pixels: Tensor, blocks: int) -> Tensor:
        """Pixels (B, 3, S, S) -> tokens (B, L, W) at the entrance of the last ``blocks`` blocks of the tower.

        Raises ValueError when the tower is not open_clip's VisionTransformer or has not that many blocks.
        """
        visual, cut = self._cut(blocks)
        tokens = visual._embeds(pixels.to(self.device))  # (B, L, W)
        for block in visual.transformer.resblocks[:cut]:
            tokens = block(tokens)  # batch first: VisionTransformer builds its blocks no other way
        return tokens

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
        return Tail(tower).requires_grad_(True)

    def _cut(self, blocks: int) -> tuple[VisionTransformer, int]:
        """The picture tower and the index of its first block that is fine-tuned."""
        from open_clip.transformer import VisionTransformer

        visual = self.model.visual
        if not isinstance(visual, VisionTransformer):
            raise ValueError(
                f"{self.name}: its picture tower is {type(visual).__name__}, not open_clip's "
                "VisionTransformer, so its last blocks cannot be fine-tuned. Take a ViT such as ViT-B-32, or "
                "a method that leaves the tower as it is."
            )
        layers = len(visual.transformer.resblocks)
        if not 1 <= blocks <= layers:
            raise ValueError(
                f"{self.name}: {blocks} blocks to fine-tune; its picture tower has 1 to {layers}."
            )
        return visual, layers - blocks


class Tail(nn.Module):
    """The end of open_clip's VisionTransformer: its last blocks, pooling and projection."""

    def __init__(self, tower: VisionTransformer) -> None:
        """Wrap ``tower``, whose patch embedding and earlier blocks have been taken out."""
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, W) -> image features (B, D), each of length one."""
        pooled, _ = self.tower._pool(self.tower.transformer(tokens))
        assert self.tower.proj is not None  # only open_clip's pruned towers have none
        return normalize(pooled @ self.tower.proj, dim=-1)


def build_clip(model: str, pretrained: str, device: str | torch.device = "cpu") -> ClipEncoder:
    """Build a frozen CLIP.

    Args:
        model: "pocket", a model name of open_clip, or "hf-hub:ORG/NAME" or "local-dir:FOLDER" with an
            open_clip_config.json, which bring their own weights.
        pretrained: A checkpoint path, a pretrained tag of the model, or "random:SEED"; for the model "pocket"
            also "pocket", the weights in this package; empty for "hf-hub:" and "local-dir:".
        device: Where both towers live.

    Raises FileNotFoundError when the weights are nowhere, before anything is built; ValueError for an
    unknown model or tag, a refused or unfitting checkpoint, or a model whose pictures are not square;
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


def pocket_tokenizer() -> SimpleTokenizer:
    """The pocket model's tokenizer: open_clip's, over the merges that this package brings."""
    from open_clip import SimpleTokenizer

    context = json.loads((CONFIGS / f"{_POCKET}.json").read_text())["text_cfg"]["context_length"]
    return SimpleTokenizer(bpe_path=str(CONFIGS / "bpe_pocket.txt.gz"), context_length=context)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of ``words`` (lower case a-z) a single token, commonest pair first.

    Each word counts once and ties go by the alphabet, so the same words give the same merges. Words that are
    not among them still have tokens: their parts, at worst their bytes. Source: Sennrich et al., arXiv
    1508.07909.
    """
    pieces = [(*word[:-1], word[-1] + "</w>") for word in set(words)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        most = max(counts.values())
        merges.append(min(pair for pair, count in counts.items() if count == most))
        merged = (_merge(word, merges[-1]) for word in pieces)
        pieces = [word for word in merged if len(word) > 1]  # the others are whole
    return merges


def write_merges(words: Iterable[str], path: Path) -> int:
    """Write ``learn_merges(words)`` as open_clip's SimpleTokenizer reads them; return the vocabulary's size.

    ``medfocus/configs/bpe_pocket.txt.gz`` is made so out of the words in ``words_pocket.txt`` beside it.
    """
    merges = learn_merges(words)
    text = "\n".join(["#version: words_pocket.txt", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 2 * 256 + len(merges) + 2  # every byte inside and at the end of a word, the merges, start and end


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in word:
        return word
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


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
