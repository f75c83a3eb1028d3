"""Building CLIP, its features, its trunk and tail, and its prompts."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import normalize as normalize_pixels
from torchvision.transforms.functional import to_tensor

from medfocus.clip.build import build_clip
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.prompts import TEMPLATES, class_embeddings, text_prompts
from medfocus.clip.tokenizer import CONFIGS, pocket_tokenizer
from medfocus.clip.towers.base import TowerError
from medfocus.pocket.merges import write_merges
from tests.conftest import snapshot
from tests.towers import small_vit

LAION_HUB_ID = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
OPENAI_HUB_ID = "timm/vit_base_patch32_clip_224.openai"
TEXT_CFG = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION_CFG = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3}


def seeded(function: Any, *arguments: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return function(*arguments, **options)


def pixels(encoder: ClipEncoder, count: int = 3) -> Tensor:
    return seeded(torch.randn, count, 3, encoder.image_size, encoder.image_size)


@pytest.fixture(scope="session")
def small() -> ClipEncoder:
    return small_vit()


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write random weights in the published formats: b32.pt of open_clip's training, and safetensors."""
    folder = tmp_path_factory.mktemp("full_size")
    for model, name in (("ViT-B-32", "b32"), ("ViT-B-16", "b16")):
        clip = seeded(open_clip.create_model, model, pretrained=None)
        state = {key: tensor.half() for key, tensor in clip.state_dict().items()}
        if name == "b32":
            torch.save({"epoch": 32, "name": model, "state_dict": state}, folder / "b32.pt")
        save_file(state, folder / f"{name}.safetensors")
    yield folder
    for file in folder.iterdir():  # pytest keeps the folders of three runs, and this folder has a gigabyte
        file.unlink()


def write_model_folder(folder: Path, vision: dict[str, Any], mean: float = 0.5) -> None:
    """Write a model in the format of the hub: a configuration and a checkpoint of random weights."""
    folder.mkdir(exist_ok=True)
    model = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT_CFG}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [mean] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    clip = seeded(open_clip.create_model, f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for parameter in clip.parameters():  # the initial zeros and ones would hide missing terms
            parameter.add_(0.02 * seeded(torch.randn, parameter.shape))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")


def test_features_have_length_one_and_the_shared_dimension(small: ClipEncoder) -> None:
    images, texts = small.encode_images(pixels(small)), small.encode_texts(["a heart", "a lung"])
    assert images.shape == (3, small.dim) and texts.shape == (2, small.dim)
    assert torch.allclose(torch.cat([images, texts]).norm(dim=-1), torch.ones(5), atol=1e-6)
    assert small.logit_scale == pytest.approx(1 / 0.07)


def test_a_seed_determines_the_weights_and_does_not_change_the_global_generator(small: ClipEncoder) -> None:
    before = torch.random.get_rng_state()
    same, other = small_vit(), small_vit(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same.key == small.key != other.key
    x = pixels(small)
    assert torch.equal(same.encode_images(x), small.encode_images(x))
    assert not torch.allclose(other.encode_images(x), small.encode_images(x), atol=1e-3)


def test_the_towers_are_frozen(small: ClipEncoder) -> None:
    assert not small.model.training
    assert not any(parameter.requires_grad for parameter in small.model.parameters())
    assert not small.encode_images(pixels(small)).requires_grad


def test_preprocessing_equals_torchvision(small: ClipEncoder) -> None:
    views = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    expected = torch.stack(
        [normalize_pixels(to_tensor(view), list(small.mean), list(small.std)) for view in views]
    )
    assert torch.allclose(small.preprocess(views), expected, atol=1e-6)
    assert torch.equal(small.preprocess(torch.from_numpy(views)), small.preprocess(views))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_trunk_and_tail_of_a_transformer_equal_the_image_encoder(small: ClipEncoder, blocks: int) -> None:
    x = pixels(small)
    tokens = small.trunk(x, blocks)
    assert tokens.shape == (3, 1 + 64, 128)
    assert torch.allclose(small.tail(blocks)(tokens), small.encode_images(x), atol=1e-6)


VARIANTS: dict[str, dict[str, Any]] = {
    "mean over patches, no first norm": {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True},
    "attentional pooling": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "patch dropout": {"patch_dropout": 0.5},
    "open_clip's attention": {"qk_norm": True, "scale_heads": True, "scale_attn": True, "scale_fc": True},
    "layer scale, fixed positions": {"ls_init_value": 0.1, "pos_embed_type": "sin_cos_2d"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_trunk_and_tail_support_every_variant_of_vision_transformer(tmp_path: Path, variant: str) -> None:
    write_model_folder(tmp_path / "model", {**VISION_CFG, **VARIANTS[variant]})
    encoder = build_clip(f"local-dir:{tmp_path / 'model'}", "")
    x = pixels(encoder)
    for blocks in (1, 3):
        tail = encoder.tail(blocks)
        assert torch.allclose(tail(encoder.trunk(x, blocks)), encoder.encode_images(x), atol=1e-6)
        assert torch.allclose(tail.train()(encoder.trunk(x, blocks)), encoder.encode_images(x), atol=1e-6)


@pytest.mark.parametrize("region", [None, "alpha", "attention", "dual", "dual-crop"])
def test_an_activation_cache_passes_a_batch_once_and_keeps_every_bit(
    small: ClipEncoder, region: str | None
) -> None:
    """Features, tokens and patches of a batch equal those without a cache, and cost one pass."""
    encoder = small if region is None else small.with_region(region, 2.0)
    channels = {None: 3, "alpha": 4, "attention": 4, "dual": 6, "dual-crop": 6}[region]
    shape = (2, encoder.image_size, encoder.image_size, channels)
    batches = [torch.from_numpy(np.random.default_rng(i).integers(0, 256, shape, np.uint8)) for i in range(3)]
    passes: list[int] = []
    visual: Any = encoder.model.visual
    hook = visual.transformer.resblocks[0].register_forward_hook(lambda *_: passes.append(1))

    def outputs(of: ClipEncoder, batch: Tensor) -> list[Tensor]:
        return [
            of.encode_images(of.preprocess(batch)),
            of.trunk(of.preprocess(batch), 1),
            of.encode_layers(of.preprocess(batch), (2,), 4),
        ]

    try:
        expected = [outputs(encoder, batch) for batch in batches]
        passes.clear()
        caching = encoder.with_activation_cache()
        cached = [outputs(caching, batch) for batch in batches]
    finally:
        hook.remove()
    for one, other in zip(expected, cached, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    images = 2 if str(region).startswith("dual") else 1
    assert len(passes) == (3 + 2) * images  # the first batch collects the depths


def test_training_a_tail_does_not_change_the_encoder(small: ClipEncoder) -> None:
    x = pixels(small)
    tail, before = small.tail(2), small.encode_images(x)
    names = [name for name, _ in tail.named_parameters()]
    assert not [name for name in names if "conv1" in name or "embedding" in name or "ln_pre" in name]
    optimizer = torch.optim.SGD(tail.parameters(), lr=1.0)
    tail(small.trunk(x, 2))[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in tail.parameters())
    optimizer.step()
    assert not torch.allclose(tail(small.trunk(x, 2)), before, atol=1e-3)
    assert torch.equal(small.encode_images(x), before)


def test_a_tail_is_restored_from_its_state(small: ClipEncoder) -> None:
    tail, tokens = small.tail(1), small.trunk(pixels(small), 1)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.mul_(1.5)
    restored = small.tail(1)
    restored.load_state_dict(tail.state_dict())
    assert torch.equal(restored(tokens), tail(tokens))


def test_an_image_encoder_of_an_unknown_kind_only_encodes(tmp_path: Path) -> None:
    vision = {"image_size": 32, "timm_model_name": "test_nfnet", "timm_pool": "avg"}
    write_model_folder(tmp_path / "model", vision)
    encoder = build_clip(f"local-dir:{tmp_path / 'model'}", "")
    assert encoder.encode_images(pixels(encoder, 1)).shape == (1, 8)
    expected = r"the image encoder of .*model \(timm's NormFreeNet\) has no last blocks to train\. Use a"
    with pytest.raises(TowerError, match=f"^trunk: {expected}"):
        encoder.trunk(pixels(encoder), 1)
    with pytest.raises(TowerError, match=expected):
        encoder.tail(1)


@pytest.mark.parametrize("blocks", [0, 5])
def test_a_number_of_blocks_outside_the_image_encoder_is_refused(small: ClipEncoder, blocks: int) -> None:
    with pytest.raises(
        ValueError, match=rf"trunk: {blocks} blocks to train, but the image encoder of small_vit has 1 to 4"
    ):
        small.trunk(pixels(small), blocks)


@pytest.mark.parametrize(("model", "file"), [("ViT-B-32", "b32.pt"), ("ViT-B-16", "b16.safetensors")])
def test_full_size_checkpoints_load_as_in_open_clip(full_size: Path, model: str, file: str) -> None:
    with pytest.warns(UserWarning, match="GELU or QuickGELU, so they get GELU"):
        encoder = build_clip(model, str(full_size / file))
    reference = open_clip.create_model(model, pretrained=str(full_size / file)).eval()
    x = pixels(encoder, 2)
    with torch.no_grad():
        expected = normalize(reference.encode_image(x), dim=-1)  # pyright: ignore[reportCallIssue]
        texts = reference.encode_text(open_clip.get_tokenizer(model)(["a lung"]), normalize=True)  # pyright: ignore[reportCallIssue]
    assert (encoder.dim, encoder.image_size) == (512, 224)
    assert torch.allclose(encoder.encode_images(x), expected, atol=1e-6)
    assert torch.allclose(encoder.encode_texts(["a lung"]), texts, atol=1e-6)
    assert torch.allclose(encoder.tail(2)(encoder.trunk(x, 2)), expected, atol=1e-6)


def test_a_tag_loads_from_the_hub_cache_with_the_activation_of_its_training(
    full_size: Path, hub_cache: Path
) -> None:
    os.symlink(
        full_size / "b32.safetensors", snapshot(hub_cache, OPENAI_HUB_ID) / "open_clip_model.safetensors"
    )
    tagged = build_clip("ViT-B/32", "openai")  # OpenAI's own spelling
    assert isinstance(tagged.model.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)  # pyright: ignore
    with pytest.warns(UserWarning, match="set clip.model to ViT-B-32-quickgelu"):
        by_path = build_clip("ViT-B-32", str(full_size / "b32.safetensors"))
    assert tagged.key != by_path.key  # equal weights, another activation
    named = build_clip("ViT-B-32-quickgelu", str(full_size / "b32.safetensors"))
    assert tagged.key == named.key


def test_the_file_format_does_not_change_the_key(small: ClipEncoder, tmp_path: Path) -> None:
    torch.save({"state_dict": small.model.state_dict()}, tmp_path / "a.pt")
    save_file(small.model.state_dict(), tmp_path / "a.safetensors")
    keys = {build_clip("small_vit", str(tmp_path / name)).key for name in ("a.pt", "a.safetensors")}
    assert keys == {small.key}


def test_a_hub_model_is_built_from_its_own_files_without_a_network(hub_cache: Path) -> None:
    folder = snapshot(hub_cache, "someone/tiny-clip")
    write_model_folder(folder, VISION_CFG, mean=0.25)
    encoder, local = build_clip("hf-hub:someone/tiny-clip", ""), build_clip(f"local-dir:{folder}", "")
    assert (encoder.image_size, encoder.dim, encoder.mean) == (32, 8, (0.25, 0.25, 0.25))
    assert encoder.key == local.key
    assert encoder.encode_texts(["a lung"]).shape == (1, 8)


@pytest.mark.parametrize(
    ("model", "pretrained", "parts"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k", [LAION_HUB_ID, "open_clip_model.safetensors", "clip.pretrained"]),
        (
            "hf-hub:someone/tiny-clip",
            "",
            ["someone/tiny-clip", "open_clip_model.safetensors", "local-dir:FOLDER"],
        ),
        ("ViT-B-32", "weights/gone.pt", ["'weights/gone.pt' does not exist", "clip.pretrained"]),
        ("local-dir:gone", "", ["gone/open_clip_model.safetensors' does not exist", "clip.model"]),
    ],
)
def test_missing_weights_fail_offline_before_the_model_is_built(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, model: str, pretrained: str, parts: list[str]
) -> None:
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(FileNotFoundError) as caught:
        build_clip(model, pretrained)
    assert str(caught.value).startswith(f"CLIP {model} (clip.")
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B32", "openai", r"clip\.model: open_clip has no model 'ViT-B32' \(similar: .*ViT-B-32"),
        (
            "ViT-B-32",
            "laion",
            r"\(clip\.pretrained\): 'laion' is not a tag of this model \(its tags: openai, .*\)\. Use",
        ),
        ("pocket", "openai", r"'openai' is not a tag of this model \(its tags: none\)"),
        ("pocket", "random:x", r"'random:x' is not a tag of this model .* or random:SEED"),
        (
            "hf-hub:a/b",
            "openai",
            r"CLIP hf-hub:a/b contains its weights, but clip\.pretrained is 'openai'\. Leave it empty",
        ),
    ],
)
def test_an_unknown_name_fails_with_the_known_names(model: str, pretrained: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_clip(model, pretrained)


def test_weights_of_another_architecture_are_refused(small: ClipEncoder, tmp_path: Path) -> None:
    state = small.model.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError,
        match=r"CLIP RN50-quickgelu: the weights in .*a\.safetensors are of another architecture \(.*Set",
    ):
        build_clip("RN50-quickgelu", str(tmp_path / "a.safetensors"))
    del state["visual.proj"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r'CLIP small_vit: the weights .* are of another architecture \(.*"visual\.proj"'
    ):
        build_clip("small_vit", str(tmp_path / "a.safetensors"))


def test_a_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: needs posix\.system in addition to tensors"):
        build_clip("small_vit", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_text_tower_without_its_package_names_the_package(
    small: ClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for model in ("roberta-ViT-B-32", "ViT-B-16-SigLIP"):
        with pytest.raises(
            ImportError, match=rf"CLIP {model}: its text .* Run `pip install 'medfocusclip\[biomed\]'`"
        ):
            build_clip(model, "random:0")


def test_the_merges_in_the_package_come_from_its_words(tmp_path: Path) -> None:
    words = (CONFIGS / "words_pocket.txt").read_text().split()
    size = write_merges(words, tmp_path / "bpe.txt.gz")
    shipped = (CONFIGS / "bpe_pocket.txt.gz").read_bytes()
    assert gzip.decompress((tmp_path / "bpe.txt.gz").read_bytes()) == gzip.decompress(shipped)
    tokenizer = pocket_tokenizer()
    assert size == tokenizer.vocab_size
    assert json.loads((CONFIGS / "clip_pocket.json").read_text())["text_cfg"]["vocab_size"] == size
    assert {word: len(tokenizer.encode(word)) for word in words} == dict.fromkeys(words, 1)


def test_the_pocket_tokenizer_encodes_unknown_words() -> None:
    tokenizer = pocket_tokenizer()
    for text in ("a naevus 40 µm wide", "пневмония", "covid-19", "x☃y"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_the_templates_of_every_modality_fit_the_pocket_model() -> None:
    pocket = build_clip("pocket", "random:0")
    for modality in TEMPLATES:
        for prompts in text_prompts(["Viral Pneumonia", "squamous_cell_carcinoma"], modality):
            assert torch.isfinite(pocket.encode_texts(prompts)).all()


def test_a_prompt_longer_than_the_context_is_refused(small: ClipEncoder) -> None:
    text = "a chest X-ray showing " + "very " * 30 + "normal lungs"
    with pytest.raises(
        ValueError, match=r"the prompt 'a chest X-ray .*' has \d+ tokens, and small_vit reads at most 30"
    ):
        small.encode_texts(["a lung", text])


def test_many_texts_get_the_features_of_each_text_alone(small: ClipEncoder) -> None:
    texts = [f"nodule {i}" for i in range(300)]
    together = small.encode_texts(texts)
    assert together.shape == (300, small.dim)
    assert torch.allclose(
        together[[0, 255, 256, 299]],
        torch.cat([small.encode_texts([texts[i]]) for i in (0, 255, 256, 299)]),
        atol=1e-5,
    )


def test_every_class_gets_the_prompts_of_its_modality_and_of_the_paper() -> None:
    prompts = text_prompts(["Covid", "large_cell_carcinoma"], "chest_xray")
    assert prompts[0][0] == "a chest X-ray showing Covid"
    assert prompts[1][0] == "a chest X-ray showing large cell carcinoma"
    assert all(text_prompts(["c"], modality)[0][-1] == "This is a photo of c" for modality in TEMPLATES)
    assert set(TEMPLATES) == {"chest_xray", "brain_mri", "breast_ultrasound", "chest_ct", "other"}


def test_templates_of_a_dataset_replace_those_of_the_modality() -> None:
    assert text_prompts(["a", "b"], "brain_mri", ["slice with {c} {x}"]) == [
        ["slice with a {x}"],
        ["slice with b {x}"],
    ]
    assert text_prompts(["a"], "brain_mri", ()) == text_prompts(["a"], "brain_mri")


@pytest.mark.parametrize(
    ("names", "modality", "templates", "message"),
    [
        (
            ["a"],
            "retina",
            None,
            r"modality 'retina' has no text prompts\. Use one of chest_xray, ",
        ),
        (
            ["a"],
            "other",
            ["a photo"],
            r"the template 'a photo' has no \{c\}, so its prompt would be the same",
        ),
        (["a", "_ "], "other", None, r"class 1 has an empty name"),
    ],
)
def test_prompts_without_a_class_are_refused(
    names: list[str], modality: str, templates: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text_prompts(names, modality, templates)


def test_a_class_embedding_is_the_normalised_mean_of_its_prompts(small: ClipEncoder) -> None:
    prompts = [["a lung", "a heart"], ["a brain"], ["a rib", "a lobe", "an opacity"]]
    embeddings = class_embeddings(small, prompts)
    expected = [normalize(small.encode_texts(ensemble).mean(dim=0), dim=0) for ensemble in prompts]
    assert embeddings.shape == (3, small.dim)
    assert torch.allclose(embeddings, torch.stack(expected), atol=1e-6)


def test_the_segmenter_describes_rgb_once_per_batch_and_grid(small: ClipEncoder) -> None:
    described: list[int] = []

    class Means:
        features_key = "means"

        def describe(self, images: Sequence[np.ndarray], grid: int) -> Tensor:
            described.append(grid)
            return torch.tensor([[float(p.mean()), p.shape[2]] for p in images])

    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 4), np.uint8))
    encoder = small.with_segmenter(Means()).with_activation_cache()
    expected = torch.tensor([[float(view[..., :3].numpy().mean()), 3] for view in views])
    assert torch.equal(encoder.describe(views, 4), expected)
    assert torch.equal(encoder.describe(views, 4), expected) and described == [4]
    encoder.describe(views, 8)
    encoder.describe(views.clone(), 8)
    assert described == [4, 8, 8]


def test_patch_features_follow_the_image_features(small: ClipEncoder) -> None:
    x = pixels(small)
    both = small.encode_layers(x, (0, 2, 4), 4)
    assert both.shape == (3, small.dim + 3 * 4 * 4 * 128)
    assert torch.allclose(both[:, : small.dim], small.encode_images(x), atol=1e-6)
    tokens = small.trunk(x, 2)[:, 1:]  # what block 2 of 4 gives, (B, 64, W)
    cells = tokens.unflatten(1, (4, 2, 4, 2)).mean(dim=(2, 4))  # (B, 4, 4, W): two by two patches a cell
    second = both[:, small.dim + 2048 : small.dim + 4096].unflatten(1, (128, 4, 4))
    assert torch.allclose(second, cells.permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(("layers", "grid"), [((5,), 4), ((1,), 9), ((1,), 0)])
def test_layers_and_grids_outside_the_image_encoder_are_refused(
    small: ClipEncoder, layers: tuple[int, ...], grid: int
) -> None:
    with pytest.raises(ValueError, match="the image encoder of small_vit has layers 0 to 4 of 8 x 8 cells"):
        small.encode_layers(pixels(small), layers, grid)
