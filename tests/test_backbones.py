"""Supervised timm backbones: from scratch, from files and from caches, in full and linear tuning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import IMAGES, Support
from medfocus.methods.backbone import Backbone, at_least_two
from medfocus.serving import checkpoint

CLASSES = 3
SMALL: dict[str, dict[str, Any]] = {
    "resnet": {"model": "resnet10t", "options": {"layers": (1, 1, 1, 1), "channels": [16, 16, 32, 32]}},
    "res2net": {
        "model": "res2net50_14w_8s",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 32]},
    },
    "vit": {"model": "vit_tiny_patch16_224", "options": {"depth": 2, "patch_size": 8, "embed_dim": 96}},
    "swin": {
        "model": "swin_tiny_patch4_window7_224",
        "options": {"window_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]},
    },
}
TRAINING: dict[str, Any] = {
    "pretrained": "", "image_size": 32, "tuning": "full", "epochs": 12, "max_steps": 1000, "batch_size": 8,
    "lr": 2e-3, "weight_decay": 1e-2,
}  # fmt: skip


def backbone(family: str = "resnet", **changes: Any) -> Backbone:
    return Backbone(None, **{**TRAINING, **SMALL[family], **changes})  # pyright: ignore[reportArgumentType]


def coloured(count: int, seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return images (N, 40, 40, C) uint8 and labels (N,); the brightest colour of an image is its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 40, 40, channels), generator=generator)
    images[torch.arange(count), :, :, labels] += 100
    return images.to(torch.uint8), labels


def support_of(count: int = 24, views: int = 1, channels: int = 3) -> Support:
    images, labels = coloured(count, channels=channels)
    inputs = torch.stack([images + number for number in range(views)])
    return Support(inputs, labels, torch.arange(count), torch.eye(CLASSES))


def fitted(family: str = "resnet", support: Support | None = None, **changes: Any) -> Backbone:
    return backbone(family, **changes).fit(support or support_of(), torch.Generator().manual_seed(0))


def published(path: Path, classes: int = 7, **options: Any) -> nn.Module:
    """Return a small ResNet and write its weights to a file in timm's format, as a download does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        options = {**SMALL["resnet"]["options"], **options}
        model = timm.create_model("resnet10t", num_classes=classes, **options)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    save_file(model.state_dict(), path)
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    """Return a network fitted once on two views of 24 images."""
    return fitted(support=support_of(views=2))


@pytest.mark.parametrize("family", SMALL)
def test_every_family_learns_and_predicts_the_same_after_loading(family: str) -> None:
    method = fitted(family)
    images, labels = coloured(70, seed=9)  # more than one batch
    logits = method.logits(images)["head"]
    assert logits.shape == (70, CLASSES)
    assert float((logits.argmax(dim=1) == labels).double().mean()) > 0.8
    assert not method.model_.training
    torch.manual_seed(11)
    expected = torch.random.get_rng_state()
    again = backbone(family).load(copy.deepcopy(method.state()))
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.equal(again.logits(images)["head"], logits)


def test_a_backbone_survives_its_checkpoint(resnet: Any, tmp_path: Path) -> None:
    settings = {**TRAINING, **SMALL["resnet"]}
    header = checkpoint.Header("resnet", settings, ("a", "b", "c"), "none", "towers", 0, 0, {})
    checkpoint.save(resnet, header, tmp_path / "method.safetensors")
    kept = checkpoint.read_header(tmp_path / "method.safetensors").settings  # JSON turns tuples into lists
    again = backbone(**kept).load(load_file(tmp_path / "method.safetensors"))
    images, _ = coloured(4)
    assert torch.equal(again.logits(images)["head"], resnet.logits(images)["head"])


def test_the_same_seed_fits_the_same_network_and_the_global_generator_is_restored(resnet: Backbone) -> None:
    torch.manual_seed(11)
    expected = torch.random.get_rng_state()
    again = fitted(support=support_of(views=2)).state()
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert all(torch.equal(again[name], value) for name, value in resnet.state().items())
    other = backbone(epochs=1).fit(support_of(views=2), torch.Generator().manual_seed(1)).state()
    assert not torch.equal(other["model.layer1.0.conv1.weight"], again["model.layer1.0.conv1.weight"])


@pytest.mark.parametrize("channels", [4, 6])
def test_all_channels_have_an_effect_and_survive_the_state(channels: int) -> None:
    support = support_of(channels=channels)
    method = fitted(support=support, epochs=2)
    images, _ = coloured(5, seed=3, channels=channels)
    logits = method.logits(images)["head"]
    last = images.clone()
    last[..., -1] = 255 - last[..., -1]
    assert not torch.allclose(method.logits(last)["head"], logits)
    assert torch.equal(backbone().load(method.state()).logits(images)["head"], logits)


def test_channels_are_normalised_by_mean_and_deviation_of_the_model() -> None:
    method = backbone(image_size=40)
    network = method.untrained(3, CLASSES)
    images, _ = coloured(2, channels=6)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's
    rgb = images.numpy() / 255
    first, second = ((rgb[..., part] - mean) / std for part in (slice(0, 3), slice(3, 6)))
    six = np.concatenate([first, second], axis=-1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(method.prepare(network, images).numpy(), six, atol=1e-5)
    four = np.concatenate([first, rgb[..., 3:4] * 2 - 1], axis=-1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(method.prepare(network, images[..., :4]).numpy(), four, atol=1e-5)
    assert backbone(image_size=32).prepare(network, images[..., :3]).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"images have 5 channels; give 3, 4 \(region\) or 6"):
        method.prepare(network, images[..., :5])


# --- pretrained weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["full", "linear"])
@pytest.mark.parametrize("classes", [7, CLASSES, 0])
def test_training_starts_with_the_features_of_the_file_and_a_new_head(
    tuning: str, classes: int, tmp_path: Path
) -> None:
    source: Any = published(tmp_path / "own.safetensors", classes)
    method = backbone(pretrained=str(tmp_path / "own.safetensors"), tuning=tuning)
    start: Any = method.untrained(3, CLASSES).eval()
    images, _ = coloured(4)
    seen = method.prepare(start, images)
    with torch.no_grad():
        assert torch.equal(start.forward_features(seen), source.forward_features(seen))
    assert start.fc.weight.shape[0] == CLASSES
    if classes == CLASSES:
        assert not torch.allclose(start.fc.weight, source.fc.weight)


def test_weights_may_be_a_pickle(tmp_path: Path) -> None:
    source = published(tmp_path / "own.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "own.pth")
    start = backbone(pretrained=str(tmp_path / "own.pth")).untrained(3, CLASSES)
    assert torch.equal(
        start.state_dict()["layer4.0.conv2.weight"], source.state_dict()["layer4.0.conv2.weight"]
    )


def test_linear_tuning_trains_only_the_head(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    source = published(path).state_dict()
    method = fitted(pretrained=str(path), tuning="linear", epochs=60, lr=2e-2, support=support_of(views=2))
    state = method.state()
    body = [name for name in source if not name.startswith("fc.")]
    assert all(torch.equal(state[f"model.{name}"], source[name]) for name in body)  # with BatchNorm's buffers
    images, labels = coloured(30, seed=9)
    logits = method.logits(images)["head"]
    assert float((logits.argmax(dim=1) == labels).double().mean()) > 0.8
    path.unlink()  # a fitted method does not need the file
    assert torch.equal(
        backbone(pretrained=str(path), tuning="linear").load(state).logits(images)["head"], logits
    )


def test_full_tuning_trains_every_layer(tmp_path: Path) -> None:
    source = published(tmp_path / "own.safetensors")
    method = fitted(pretrained=str(tmp_path / "own.safetensors"), epochs=1)
    state = method.state()
    for name, weight in source.named_parameters():
        if not name.startswith("fc."):
            assert not torch.equal(state[f"model.{name}"], weight), name


def test_weights_of_three_channels_are_repeated_for_a_fourth(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    source = published(path).state_dict()["conv1.0.weight"]
    start = backbone(pretrained=str(path)).untrained(4, CLASSES).state_dict()["conv1.0.weight"]
    torch.testing.assert_close(start, source[:, [0, 1, 2, 0]] * 3 / 4)


def test_weights_for_a_larger_image_size_are_resampled(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL["vit"]["options"])
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    start = backbone("vit", pretrained=str(tmp_path / "vit.safetensors")).untrained(3, CLASSES).state_dict()
    assert start["pos_embed"].shape == (1, 1 + 16, 96)
    assert torch.equal(start["blocks.1.mlp.fc1.weight"], source.state_dict()["blocks.1.mlp.fc1.weight"])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "wide.safetensors", channels=[16, 16, 32, 48])
    with pytest.raises(
        ValueError, match=r"(?s)cannot build 'resnet10t' .*wide\.safetensors .*give weights of this model"
    ):
        fitted(pretrained=str(tmp_path / "wide.safetensors"))
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"(?s)foreign\.safetensors .*Missing key"):
        fitted(pretrained=str(tmp_path / "foreign.safetensors"))


def test_a_missing_file_is_named_in_the_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrained: the file 'no/such\.pth' does not exist"):
        fitted(pretrained="no/such.pth")


def test_an_empty_cache_is_an_error_that_names_the_searched_places_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(FileNotFoundError) as error:
        fitted(pretrained="cache")
    for part in (
        "pretrained is 'cache'",
        "there is no model.safetensors or",
        f"'timm/resnet10t.c3_in1k' in {tmp_path}",
        f", nor {tmp_path / 'torch' / 'hub' / 'checkpoints' / 'resnet10t_176_c3-f3215ab1.pth'}. Set",
        "Set pretrained to a .safetensors or .pth file",
        "`hf download timm/resnet10t.c3_in1k model.safetensors`",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"timm has no weights of 'nf_resnet26'"):
        fitted(model="nf_resnet26", options={}, pretrained="cache")


def test_weights_come_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--timm--resnet10t.c3_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    source = published(repo / "snapshots" / "abc" / "model.safetensors").state_dict()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = backbone(pretrained="cache").untrained(3, CLASSES).state_dict()
    assert torch.equal(start["layer1.0.conv1.weight"], source["layer1.0.conv1.weight"])


def test_weights_come_from_the_cache_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    source = published(tmp_path / "own.safetensors").state_dict()
    torch.save(source, folder / "resnet10t_176_c3-f3215ab1.pth")
    start = backbone(pretrained="cache").untrained(3, CLASSES).state_dict()
    assert torch.equal(start["layer1.0.conv1.weight"], source["layer1.0.conv1.weight"])


def test_the_note_names_the_source_of_the_weights() -> None:
    assert backbone().note == "from scratch"
    assert backbone(pretrained="/data/weights/own.pth").note == "pretrained: own.pth"
    assert backbone(pretrained="cache").note == "pretrained: timm/resnet10t.c3_in1k"


# --- steps and settings ---------------------------------------------------------------------------


def test_batch_normalisation_works_with_a_last_batch_of_one() -> None:
    method = fitted(support=support_of(9), epochs=1)  # batches of 8 and 1, with 1 x 1 feature maps
    assert all(value.isfinite().all() for value in method.state().values())
    assert (
        fitted(support=support_of(9), epochs=1, batch_size=1).logits(coloured(2)[0])["head"].isfinite().all()
    )
    index, view = at_least_two(torch.tensor([8]), torch.tensor([1]), 9)
    assert (index.tolist(), view.tolist()) == ([8, 0], [1, 1])
    index, view = torch.tensor([3, 1]), torch.tensor([0, 1])
    assert at_least_two(index, view, 9) == (index, view)


def test_a_backbone_trains_on_images() -> None:
    method = backbone()
    images, _ = coloured(2)
    assert method.embedding == IMAGES
    assert (method.needs_towers, method.takes_views, method.learns) == (False, True, True)
    assert torch.equal(method.embed(images), images)


def test_the_loss_is_cross_entropy_of_the_drawn_view() -> None:
    """A single step on the whole support: AdamW's first step follows the sign of the gradient."""
    support = support_of(6, views=1)
    method = backbone(batch_size=6, epochs=1, lr=1e-3, weight_decay=0.0)
    moved = method.fit(support, torch.Generator().manual_seed(0)).state()["model.fc.bias"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start: Any = method.untrained(3, CLASSES)
    logits = start.train()(method.prepare(start, support.inputs[0]))
    gradient = torch.autograd.grad(functional.cross_entropy(logits, support.labels), start.fc.bias)[0]
    torch.testing.assert_close(moved, start.fc.bias.detach() - 1e-3 * gradient.sign(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "resnet10"}, r"timm has no model 'resnet10' \(similar: resnet10t, .*timm\.list_models"),
        ({"model": "hf-hub:timm/resnet10t.c3_in1k"}, "timm has no model 'hf-hub:"),
        ({"tuning": "head"}, "tuning is 'head'; use one of full, linear"),
        ({"max_steps": 0}, "max_steps is 0; use 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; use 1 or more"),
        ({"options": {"num_classes": 4}}, "options has num_classes, set by other fields .*Remove it"),
    ],
)
def test_invalid_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone: {message}"):
        backbone(**changed)


def test_an_error_of_timm_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"cannot build 'resnet10t' at 32 px with options .*windows.*Change"):
        fitted(options={"windows": 3})
    with pytest.raises(ValueError, match=r"cannot build 'resnet18\.nope' .*Invalid pretrained tag"):
        fitted(model="resnet18.nope", options={})


@pytest.mark.parametrize(("family", "patch"), [("vit", 8), ("swin", 4)])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(family: str, patch: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size is 30, .* {patch} px\. .*multiple of {patch}\."):
        fitted(family, image_size=30)


def test_a_swin_transformer_pads_windows_that_do_not_tile_the_image() -> None:
    """timm pads 7 x 7 windows on 10 x 10 patches."""
    options = {**SMALL["swin"]["options"], "window_size": 7}
    method = fitted("swin", options=options, image_size=40, epochs=1)
    assert method.logits(coloured(2)[0])["head"].isfinite().all()


def test_linear_tuning_needs_one_linear_classifier() -> None:
    options = {"depth": 1, "embed_dim": 48}
    with pytest.raises(ValueError, match="classifier of 'deit_tiny_distilled_patch16_224' is tuple, not one"):
        fitted(model="deit_tiny_distilled_patch16_224", options=options, tuning="linear")
