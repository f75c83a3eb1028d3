"""The published layouts of CLIP load as in their own libraries; what does not fit together is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import convert_weights_to_lp
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn

from medfocus import MedFocusCLIP
from medfocus.clip.build import build_clip
from medfocus.serving.model_folder import load_model
from medfocus.storage import weights
from tests.conftest import snapshot

PROMPTS = ["a chest X-ray showing pneumonia", "a normal lung"]
OPENAI = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
BIOMED_TEXT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
SIGLIP_TEXT = "timm/ViT-B-16-SigLIP"
pytestmark = pytest.mark.usefixtures("hub_cache")

WORDS = ("a", "chest", "x", "ray", "showing", "pneumonia", "normal", "lung", "very")


def perturbed(model: Any) -> Any:
    """Move every weight, because initial zeros and ones would hide missing terms."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


# OpenAI's files


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write random weights in the layout of OpenAI's files: traced, half precision, three more entries.

    The folder has openai.pt, and state.pt with the same tensors in a pickle. open_clip gets the
    configurations tiny-openai and tiny-openai-quickgelu.
    """
    folder = tmp_path_factory.mktemp("openai")
    for name, more in (("tiny-openai", {}), ("tiny-openai-quickgelu", {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps({**OPENAI, **more}))
        open_clip.add_model_config(folder / f"{name}.json")
    model: Any = perturbed(open_clip.create_model("tiny-openai-quickgelu", pretrained=None))
    mask = model.attn_mask
    del model.attn_mask
    model.attn_mask = mask  # OpenAI's mask is no buffer
    del model.context_length, model.vocab_size
    for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        model.register_buffer(name, torch.tensor(value))
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace_module(model, {"encode_image": (images(32),), "encode_text": (tokens,)})
    convert_weights_to_lp(model, torch.float16)  # as OpenAI's files: not the norms and the embeddings
    halved = model.state_dict()
    for name, parameter in traced.named_parameters():
        parameter.data = halved[name]
    traced.save(str(folder / "openai.pt"))
    torch.save(model.state_dict(), folder / "state.pt")
    return folder


def test_openai_s_archive_loads_as_in_open_clip(openai: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference: Any = open_clip.openai.load_openai_model(str(openai / "openai.pt"), "fp32", "cpu")
    encoder = build_clip("tiny-openai", str(openai / "openai.pt"))
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    with torch.no_grad():
        tokens = encoder.tokenizer(PROMPTS)
        expected = reference.encode_image(images(32), normalize=True)
        assert torch.allclose(encoder.encode_images(images(32)), expected, atol=5e-7)
        texts = reference.encode_text(tokens, normalize=True)
        assert torch.allclose(encoder.encode_texts(PROMPTS), texts, atol=5e-7)
    ours, theirs = encoder.model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_openai_s_weights_get_quickgelu_whatever_the_model_s_name_says(openai: Path) -> None:
    encoders = [
        build_clip(model, str(openai / "openai.pt")) for model in ("tiny-openai", "tiny-openai-quickgelu")
    ]
    assert encoders[0].key == encoders[1].key
    assert encoders[0].config["model_cfg"]["quick_gelu"] is True
    assert any(isinstance(module, QuickGELU) for module in encoders[0].model.modules())
    state = build_clip("tiny-openai", str(openai / "state.pt"))  # the three entries tell it too
    assert state.config == encoders[0].config


def test_tensors_that_do_not_say_their_activation_give_a_warning(openai: Path, tmp_path: Path) -> None:
    plain = {
        name: value
        for name, value in weights.load(openai / "state.pt").items()
        if value.ndim or "scale" in name
    }
    save_file(plain, tmp_path / "plain.safetensors")
    expected = (
        r"CLIP tiny-openai: .*plain\.safetensors does not say whether its weights need GELU or QuickGELU, so "
        r"they get GELU\. .* set clip\.model to tiny-openai-quickgelu\."
    )
    with pytest.warns(UserWarning, match=expected):
        guessed = build_clip("tiny-openai", str(tmp_path / "plain.safetensors"))
    named = build_clip("tiny-openai-quickgelu", str(tmp_path / "plain.safetensors"))
    assert guessed.key != named.key


def test_an_archive_s_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of this archive makes a file when torch.jit.load opens it."""

    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.arange(3.0)

        def forward(self) -> Tensor:
            return self.w

        @torch.jit.export
        def __getstate__(self) -> tuple[Tensor, bool]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return self.w, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[Tensor, bool]) -> None:
            self.training = state[1]
            self.w = torch.from_file("trap", shared=True, size=4)

    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Trap()).save("trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt: .*"):
        weights.load(Path("trap.pt"))
    assert not Path("trap").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load("trap.pt")
    assert Path("trap").exists()  # the trap works, so ``load`` ran no code


def test_a_pickle_of_an_archive_with_other_names_is_refused(openai: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    with zipfile.ZipFile(openai / "openai.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            hostile = name.endswith("/data.pkl")
            bad.writestr(name, pickle.dumps({"w": Touch()}) if hostile else good.read(name))
    with pytest.raises(
        ValueError, match=r"bad\.pt: needs pathlib\S* in addition to tensors.* as safetensors"
    ):
        weights.load(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_cut_archive_is_refused_as_incomplete(openai: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(openai / "openai.pt") as good, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in good.namelist():
            if not name.endswith("/data/3"):
                cut.writestr(name, good.read(name)[:200] if name.endswith("/data/5") else good.read(name))
    with pytest.raises(ValueError, match=r"cut\.pt: is not a complete checkpoint"):
        weights.load(tmp_path / "cut.pt")


def test_a_clip_of_transformers_loads_as_in_transformers(openai: Path, tmp_path: Path) -> None:
    """PubMedCLIP and others are published in this format only."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 49408, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 1, "max_position_embeddings": 16, "eos_token_id": 49407, "bos_token_id": 49406,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    published = perturbed(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))
    torch.save(published.state_dict(), tmp_path / "pytorch_model.bin")
    encoder = build_clip("tiny-openai-quickgelu", str(tmp_path / "pytorch_model.bin"))
    tokens = encoder.tokenizer(PROMPTS)
    with torch.no_grad():
        outputs = published(input_ids=tokens, pixel_values=images(32))
    assert torch.allclose(encoder.encode_images(images(32)), outputs.image_embeds, atol=1e-6)
    assert torch.allclose(encoder.encode_texts(PROMPTS), outputs.text_embeds, atol=1e-6)
    assert encoder.logit_scale == pytest.approx(published.logit_scale.exp().item())
    with pytest.raises(ValueError, match=r"of another architecture"):
        build_clip("RN50-quickgelu", str(tmp_path / "pytorch_model.bin"))


def tiny_siglip_in_transformers(pretrained: bool = False, **options: Any) -> nn.Module:
    """A ViT of SigLIP's kind for timm: no class token, attention pooling, GELU by tanh, 32 px by name."""
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    known = {"num_classes", "global_pool"}
    chosen = {name: value for name, value in options.items() if name in known}
    return VisionTransformer(**shape, class_token=False, act_layer="gelu_tanh", **chosen)  # pyright: ignore


def test_a_siglip_of_transformers_loads_as_in_transformers_at_its_own_size(tmp_path: Path) -> None:
    """MedSigLIP is published in this format only, and at a size that no model of timm has in its name."""
    import timm
    from transformers import SiglipConfig, SiglipModel

    timm.models.register_model(tiny_siglip_in_transformers)
    common = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**common, "vocab_size": 64, "max_position_embeddings": 12, "projection_size": 64}
    text |= {"bos_token_id": 3, "eos_token_id": 1}
    vision = {**common, "image_size": 64, "patch_size": 16}
    published = perturbed(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    folder = siglip(tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"timm_model_name": "tiny_siglip_in_transformers", "image_size": 64}
    config["model_cfg"]["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(published.state_dict(), folder / "model.safetensors")
    (folder / "open_clip_pytorch_model.bin").unlink()
    encoder = build_clip(f"local-dir:{folder}", "")
    tokens = encoder.tokenizer(PROMPTS)
    with torch.no_grad():
        outputs = published(input_ids=tokens, pixel_values=images(64))
    assert torch.allclose(encoder.encode_images(images(64)), outputs.image_embeds, atol=1e-6)
    assert torch.allclose(encoder.encode_texts(PROMPTS), outputs.text_embeds, atol=1e-6)
    model: Any = encoder.model
    ours = encoder.logit_scale * encoder.encode_images(images(64)) @ encoder.encode_texts(PROMPTS).T
    assert torch.allclose(ours + model.logit_bias, outputs.logits_per_image, atol=1e-4)


# Text towers of Hugging Face


def write_tokenizer(folder: Path, form: str) -> None:
    """Write a tokenizer of whole words: "bert" with [CLS] and [SEP], "siglip" with </s> and padding by it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "</s>", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    template, pad = ("[CLS] $A [SEP]", "[PAD]") if form == "bert" else ("$A </s>", "</s>")
    built.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=template,
        special_tokens=[(token, vocabulary[token]) for token in template.split() if token != "$A"],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token=pad, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)


def write_folder(folder: Path, model: dict[str, Any], preprocess: dict[str, Any]) -> None:
    """Write a configuration and random weights in open_clip's layout, as on the hub."""
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    )
    text = {**model["text_cfg"]}
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    built: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False, text_cfg=text)
    state = perturbed(built).state_dict()
    if "hf_model_name" in text:  # the published file has an entry that transformers no longer saves
        state["text.transformer.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")


def biomed(folder: Path) -> Path:
    """Write a BiomedCLIP: timm's ViT, PubMedBERT and its tokenizer, with the names of the published one."""
    from transformers import BertConfig

    BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37,
        max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    write_tokenizer(folder, "bert")
    model = {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "",
            "timm_proj": "linear", "image_size": 160,
        },
        "text_cfg": {
            "hf_model_name": BIOMED_TEXT, "hf_tokenizer_name": BIOMED_TEXT, "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12,
        },
    }  # fmt: skip
    write_folder(folder, model, {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]})
    return folder


def siglip(folder: Path) -> Path:
    """Write a SigLIP: timm's ViT with attention pooling, open_clip's text tower, a logit bias."""
    write_tokenizer(folder, "siglip")
    model = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False,
            "timm_pool": "map", "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": 64, "hf_tokenizer_name": SIGLIP_TEXT,
            "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 64, "heads": 2, "layers": 2,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        },
    }  # fmt: skip
    half = [0.5, 0.5, 0.5]
    write_folder(
        folder, model, {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    )
    return folder


def reference(folder: Path) -> tuple[Any, Any]:
    """Return open_clip's own model and tokenizer of a folder, whose text tower it finds by path."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    more = {"hf_model_name": str(folder), "hf_model_pretrained": False} if "hf_model_name" in config else {}
    built: Any = open_clip.create_model(
        f"local-dir:{folder}", load_weights=False, text_cfg={**config, **more}
    )
    open_clip.load_checkpoint(built, str(folder / "open_clip_pytorch_model.bin"))
    return built.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("layout", [biomed, siglip])
def test_a_text_tower_of_hugging_face_loads_from_a_folder_as_in_open_clip(
    layout: Any, tmp_path: Path
) -> None:
    folder = layout(tmp_path)
    encoder = build_clip(f"local-dir:{folder}", "")
    model, tokenizer = reference(folder)
    x = images(160)
    with torch.no_grad():
        assert torch.equal(encoder.encode_images(x), model.encode_image(x, normalize=True))
        assert torch.equal(
            encoder.encode_texts(PROMPTS), model.encode_text(tokenizer(PROMPTS), normalize=True)
        )
    assert len(encoder.encode_texts(PROMPTS).unique(dim=0)) == 2
    assert encoder.frame.resize == "longest"
    published = build_clip(f"local-dir:{folder}", "", resize="published")
    assert published.frame.resize == ("squash" if layout is siglip else "shortest")


def test_siglip_s_bias_changes_no_probability_and_is_kept(tmp_path: Path) -> None:
    """A softmax over classes ignores a constant, and the sigmoid of one class needs it."""
    encoder = build_clip(f"local-dir:{siglip(tmp_path)}", "")
    model: Any = encoder.model
    x = images(160)
    logits = encoder.logit_scale * encoder.encode_images(x) @ encoder.encode_texts(PROMPTS).T
    with torch.no_grad():
        theirs, _ = model.get_logits(x, encoder.tokenizer(PROMPTS))
    assert model.logit_bias.item() != 0
    assert torch.allclose(theirs, logits + model.logit_bias, atol=1e-5)
    assert torch.allclose(theirs.softmax(dim=1), logits.softmax(dim=1), atol=1e-6)
    state = weights.load(tmp_path / "open_clip_pytorch_model.bin")
    torch.save(
        {k: v for k, v in state.items() if k != "logit_bias"}, tmp_path / "open_clip_pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"of another architecture .*logit_bias"):
        build_clip(f"local-dir:{tmp_path}", "")


@pytest.mark.parametrize("layout", [biomed, siglip])
def test_a_prompt_that_a_tokenizer_of_hugging_face_would_cut_is_refused(layout: Any, tmp_path: Path) -> None:
    encoder = build_clip(f"local-dir:{layout(tmp_path)}", "")
    most = 12 - (2 if layout is biomed else 1)
    longest = " ".join(["very"] * most)
    tokens = encoder.tokenizer([longest, f"{longest} very"])
    assert torch.equal(tokens[0], tokens[1])  # the tokenizer cuts without a word
    assert encoder.encode_texts([longest]).shape == (1, encoder.dim)
    with pytest.raises(ValueError, match=rf"has {most + 1} tokens, and local-dir:.* reads at most {most}\."):
        encoder.encode_texts(["a lung", f"{longest} very"])


def test_the_text_tower_s_files_may_be_in_the_hub_cache(hub_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    expected = build_clip(f"local-dir:{biomed(folder)}", "")
    elsewhere = snapshot(hub_cache, BIOMED_TEXT)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(elsewhere / file)
    cached = build_clip(f"local-dir:{folder}", "")
    assert cached.key == expected.key
    assert torch.equal(cached.encode_texts(PROMPTS), expected.encode_texts(PROMPTS))


@pytest.mark.parametrize(("file", "part"), [("config.json", "configuration"), ("tokenizer", "tokenizer")])
def test_a_text_tower_without_its_files_says_where_to_get_them(tmp_path: Path, file: str, part: str) -> None:
    for path in biomed(tmp_path).glob(f"{file}*"):
        path.unlink()
    expected = (
        rf"CLIP local-dir:{tmp_path}: the {part} of its text tower, {BIOMED_TEXT}, is neither in its folder "
        rf"nor in the hub cache.* `hf download {BIOMED_TEXT} --include '\*\.json' '\*\.txt' '\*\.model' "
        rf"--local-dir {tmp_path}`"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        build_clip(f"local-dir:{tmp_path}", "")


def test_a_configuration_cannot_make_its_tokenizer_run_code(tmp_path: Path) -> None:
    """With trust_remote_code, transformers would import a module of the folder."""
    config = json.loads((biomed(tmp_path) / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer option 'trust_remote_code', which was refused"):
        build_clip(f"local-dir:{tmp_path}", "")


# Combinations


@pytest.mark.parametrize(
    ("model", "pretrained", "error", "message"),
    [
        ("ViT-B-32", "FOLDER", ValueError, r"its own .* Set clip\.model to local-dir:.*, and leave"),
        ("ViT-B-32", "microsoft/BiomedCLIP", ValueError, r"hub id, set clip\.model to hf-hub:micro"),
        ("ViT-B-32", "hf-hub:a/b", ValueError, r"set clip\.model to hf-hub:a/b and leave clip\.pretrained"),
        ("microsoft/BiomedCLIP", "", ValueError, r"set it to hf-hub:microsoft/BiomedCLIP and leave"),
        ("FOLDER", "", ValueError, r"set it to local-dir:"),
        ("ViT-B-32", "", ValueError, r"'' is not a tag of this model"),
        ("ViT-B-32", "./gone.pt", FileNotFoundError, r"'\./gone\.pt' does not exist"),
        ("ViT-B-32", "EMPTY", FileNotFoundError, r"is a folder, not a file\. Give the path of a file"),
        ("local-dir:EMPTY", "", FileNotFoundError, r"open_clip_model\.safetensors' does not exist"),
    ],
)  # fmt: skip
def test_a_name_at_the_wrong_place_is_refused_with_the_right_place(
    tmp_path: Path, model: str, pretrained: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text("{}")
    places = {"FOLDER": str(tmp_path / "model"), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        model, pretrained = model.replace(name, place), pretrained.replace(name, place)
    with pytest.raises(error, match=message):
        build_clip(model, pretrained)


def test_weights_of_another_size_are_refused_and_not_resampled(openai: Path, tmp_path: Path) -> None:
    state = weights.load(openai / "state.pt")
    for name, rows in (("visual.positional_embedding", 10), ("positional_embedding", 20)):
        save_file({**state, name: torch.zeros(rows, 64)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=rf"of another architecture .*size mismatch for {name}"):
            build_clip("tiny-openai", str(tmp_path / "other.safetensors"))


def test_a_path_gets_the_preprocessing_of_the_model_s_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medfocus.clip import sources

    (tmp_path / "any.safetensors").touch()
    source = sources.locate("ViT-B-16-SigLIP", str(tmp_path / "any.safetensors"))
    assert source.options["force_preprocess_cfg"] == {
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip


def test_a_saved_classifier_carries_its_text_tower_frame_and_fill(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    folder = biomed(tmp_path / "clip")
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (60, 90 + i), np.uint8) for i in range(4)]
    classifier = MedFocusCLIP(
        method="clip-linear-probe", focus="multiply", clip=f"local-dir:{folder}", pretrained="",
        resize="published", fill="black", segmenter="otsu",
    )  # fmt: skip
    classifier.fit(pixels, ["normal", "pneumonia"] * 2).save(tmp_path / "saved")
    shutil.rmtree(folder)
    loaded = MedFocusCLIP.load(tmp_path / "saved")
    assert np.array_equal(loaded.predict_proba(pixels), classifier.predict_proba(pixels))
    predictor = load_model(tmp_path / "saved")
    assert predictor.frame == classifier.encoder_.frame and predictor.frame.resize == "shortest"
    assert predictor.fill == "black"
    explanation = loaded.explain(pixels[0])
    assert explanation.attribution.shape == (60, 90)
    assert {path.name for path in (tmp_path / "saved" / "clip").iterdir()} == {
        "config.json", "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip
