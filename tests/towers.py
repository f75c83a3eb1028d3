"""Tiny CLIPs with random weights, one for each kind of tower, in the published layouts."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder

SIZE = 32  # pixels a side of every image
WORDS = ("a", "photo", "of", "red", "green", "scan", "this", "is", ".", *string.ascii_lowercase)

open_clip.add_model_config(Path(__file__).with_name("small_vit.json"))


def small_vit(seed: int = 0) -> ClipEncoder:
    """Build a CLIP with open_clip's own ViT and random weights: 96 px, 64 patches, 4 blocks."""
    return build_clip("small_vit", f"random:{seed}")


@timm.models.register_model
def tiny_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT like BiomedCLIP's: a class token that pools."""
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return _create_vision_transformer("vit_base_patch16_224", pretrained=False, **{**shape, **options})


@timm.models.register_model
def tiny_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT like SigLIP's: no class token, and an attention pool with a learned query."""
    return tiny_vit(**{"class_token": False, "global_pool": "map", **options})


VIT = {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
BIOMED = {"image_size": SIZE, "timm_model_name": "tiny_vit", "timm_pool": "", "timm_proj": "linear"}
SIGLIP = {"image_size": SIZE, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"}
RESNET = {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
CLIP_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def timm_net(name: str, **options: Any) -> dict[str, Any]:
    """Return the configuration of an image encoder with a convolutional net of timm."""
    return {"image_size": SIZE, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", **options}


def bert_text(folder: Path) -> dict[str, Any]:
    """Write a tiny BERT and its tokenizer in Hugging Face's layout; return the text tower's configuration."""
    from transformers import BertConfig

    tokenizer = write_tokenizer(folder, start="[CLS]", end="[SEP]", padding="[PAD]")
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    return {
        "hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False,
        "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 32,
    }  # fmt: skip


def siglip_text(folder: Path) -> dict[str, Any]:
    """Write a tokenizer like SigLIP's, without a start token; return the text tower's configuration."""
    tokenizer = write_tokenizer(folder, start="", end="</s>", padding="</s>")
    return {
        **CLIP_TEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": str(folder), "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"},
    }  # fmt: skip


def write_tokenizer(folder: Path, *, start: str, end: str, padding: str) -> Any:
    """Write a tokenizer of WORDS in Hugging Face's layout, and return it."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    special = [*dict.fromkeys(filter(None, ["[UNK]", start, end, padding]))]
    vocabulary = [*special, *dict.fromkeys([*WORDS, *(f"##{letter}" for letter in string.ascii_lowercase)])]
    places = {word: place for place, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordPiece(places, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        special_tokens=[(word, places[word]) for word in filter(None, (start, end))],
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token=padding,
        cls_token=start or None,
        sep_token=end,
    )
    saved.save_pretrained(folder)
    return saved


def build(folder: Path, vision: dict[str, Any], text: dict[str, Any], **model: Any) -> ClipEncoder:
    """Write a CLIP in the hub's layout, with random weights of which none is 0 or 1, and build it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **model}
    if vision.get("timm_proj") == "none":
        config["embed_dim"] = 32  # the width of the net
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return build_clip(f"local-dir:{folder}", "")


# The CLIPs of the table in docs/methods.md, by their row
KINDS = (
    "ViT of open_clip",
    "ViT of timm",
    "ViT of timm with an attention pool",
    "ModifiedResNet",
    "net of timm",
)


def build_kind(kind: str, folder: Path) -> ClipEncoder:
    """Build the CLIP of a kind, with the text tower that it is published with."""
    if kind == "ViT of open_clip":
        return build(folder, VIT, CLIP_TEXT)
    if kind == "ViT of timm":
        return build(folder, BIOMED, bert_text(folder))
    if kind == "ViT of timm with an attention pool":
        return build(folder, SIGLIP, siglip_text(folder), custom_text=True, init_logit_bias=-10)
    if kind == "ModifiedResNet":
        return build(folder, RESNET, CLIP_TEXT)
    return build(folder, timm_net("test_efficientnet"), CLIP_TEXT)
