"""Every kind of tower: its verbs against the libraries' results, and every method with every focus."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.study.methods import check_towers
from flows.study.params import load_params
from medfocus.clip.encoder import ClipEncoder
from medfocus.clip.lora import LoraTowers
from medfocus.clip.prompts import class_embeddings
from medfocus.clip.regions import REGIONS
from medfocus.clip.towers.base import TowerError
from medfocus.clip.towers.convolutional import CHAINS
from medfocus.explain.explain import explain
from medfocus.learning.method import Support
from medfocus.methods import METHODS
from medfocus.methods.clip import ClipZeroShot
from medfocus.serving import checkpoint, defaults
from medfocus.serving.estimator import MedFocusCLIP
from tests.towers import CLIP_TEXT, KINDS, SIZE, build, build_kind, timm_net

VITS = KINDS[:3]
CONVOLUTIONAL = KINDS[3:]
NAMES = ("red", "green")
PROMPTS = tuple((f"a photo of {name}", f"this is a scan of {name}") for name in NAMES)
FOCUSES = ("none", *REGIONS)
CHANNELS = {"none": 3, "alpha": 4, "attention": 4, "dual": 6, "dual-crop": 6}

# Rows of a study on CLIP, with settings for one or two steps
WITHOUT_CLIP = {"pixels", "pixels-svm", "slca", "resnet"}
SHORT = {
    "epochs": 1, "max_steps": 2, "steps": 2, "steps_per_shot": 1, "warmup": 0, "folds": 2, "batch_size": 4,
    "lr": 1e-2, "alphas": (1.0,), "betas": (1.0,), "neighbours": (1,), "contexts": 4, "start": "a photo of a",
}  # fmt: skip
VARIANTS = {
    "medfocusclip-layers": {"layers": (0, 2), "grid": 2},
    "medfocusclip-lora": {"tuning": "lora", "layers": ()},
    "medfocusclip-full": {"tuning": "full", "blocks": 2, "layers": ()},
}
PLAIN = {name: {} for name in METHODS if name not in WITHOUT_CLIP}
ROWS: dict[str, dict[str, Any]] = {**PLAIN, "medfocusclip": {"layers": ()}, **VARIANTS}
BLOCK_WEIGHTS = ("clip-lora", "medfocusclip-lora", "clip-svd")


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ClipEncoder]:
    return cache(lambda kind: build_kind(kind, tmp_path_factory.mktemp("clip")))


def settings_of(row: str) -> dict[str, Any]:
    known = defaults.method_settings(row.rpartition("-")[0] if row in VARIANTS else row, "small")
    known = known | {name: value for name, value in SHORT.items() if name in known} | ROWS[row]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def views_of(focus: str, count: int = 8, seed: int = 0) -> Tensor:
    """Draw views (N, S, S, C) uint8 of two alternating brightnesses, with a region in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 200, (count, SIZE, SIZE, CHANNELS[focus]), generator=generator)
    views[1::2] += 55
    if CHANNELS[focus] == 4:
        views[..., 3] = 0
        views[:, : SIZE // 2, :, 3] = 255
    return views.to(torch.uint8)


def pixels_of(focus: str = "none", count: int = 3) -> Tensor:
    """Draw pixels (B, C, S, S) with a region in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, CHANNELS[focus], SIZE, SIZE, generator=generator)
    if CHANNELS[focus] == 4:
        pixels[:, 3] = torch.rand(count, SIZE, SIZE, generator=generator)
    return pixels


def with_focus(encoder: ClipEncoder, focus: str) -> ClipEncoder:
    return encoder if focus == "none" else encoder.with_region(focus, 2.0)


def can(encoder: ClipEncoder, focus: str) -> bool:
    return focus == "none" or encoder.tower.verbs >= set(REGIONS[focus].needs)


# --- the table of methods, focus modes and towers -------------------------------------------------


@pytest.mark.parametrize(("kind", "row", "focus"), [*product(KINDS, ROWS, FOCUSES)])
def test_every_method_with_every_focus_fits_and_is_restored_or_is_refused_by_name(
    kind: str, row: str, focus: str, encoder_of: Callable[[str], ClipEncoder], tmp_path: Path
) -> None:
    encoder, caller = encoder_of(kind), f"{row} with the focus {focus!r}"
    name, settings = row.rpartition("-")[0] if row in VARIANTS else row, settings_of(row)

    def checked() -> Any:
        encoder.require(REGIONS[focus].needs if focus in REGIONS else (), caller)
        method = METHODS[name](with_focus(encoder, focus), **settings)
        method.check_towers(caller)
        return method

    if kind in CONVOLUTIONAL and (focus == "attention" or row in BLOCK_WEIGHTS):
        with pytest.raises(
            TowerError, match=rf"^{re.escape(caller)}: the image encoder of .* has no .*\. Use "
        ):
            checked()
        return
    method = checked()
    inputs = method.embed(views_of(focus))
    support = Support(
        inputs[None],
        torch.arange(8) % 2,
        torch.arange(8),
        class_embeddings(encoder, PROMPTS),
        NAMES,
        PROMPTS,
    )
    method.fit(support, torch.Generator().manual_seed(0))
    logits = method.logits(inputs)
    assert all(values.shape == (8, 2) and values.isfinite().all() for values in logits.values())
    header = checkpoint.Header(name, settings, NAMES, focus, method.encoder.key, 0, 0, {})
    checkpoint.save(method, header, tmp_path / "cell.safetensors")
    again, _ = checkpoint.load(tmp_path / "cell.safetensors", with_focus(encoder, focus))
    for classifier, values in again.logits(inputs).items():
        torch.testing.assert_close(values, logits[classifier], rtol=0, atol=1e-5)


def test_the_table_of_the_documentation_is_true(encoder_of: Callable[[str], ClipEncoder]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    part = text.split("### What works on which CLIP")[1]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    header, _, *lines = [[cell.strip() for cell in row] for row in rows]
    verbs = {
        "`layers`": "stages",
        "last blocks": "tail",
        "low-rank updates": "projections",
        "`attention`": "attention-bias",
        "`alpha`": "channel",
    }
    assert [line[0].split(" (")[0] for line in lines] == list(KINDS)
    for kind, line in zip(KINDS, lines, strict=True):
        encoder = encoder_of(kind)
        told = dict(zip(header, line, strict=True))
        for column, verb in verbs.items():
            assert told[column] == ("yes" if verb in encoder.tower.verbs else "no"), (kind, column)
        method = ClipZeroShot(encoder).load({"text_features": class_embeddings(encoder, PROMPTS)})
        _, way = explain(method, encoder, views_of("none", 1), torch.tensor([0]))
        assert told["explained by"] == way
        assert {"contexts", "projections"} <= encoder.text_tower.verbs


# --- trunk, tail and layers -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "focus"), [*product(KINDS, FOCUSES)])
def test_trunk_and_tail_equal_the_image_encoder_in_training_too(
    kind: str, focus: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = encoder_of(kind)
    if not can(encoder, focus):
        pytest.skip("refused in the table above")
    encoder, x = with_focus(encoder, focus), pixels_of(focus)
    expected = encoder.encode_images(x)
    assert torch.equal(encoder.with_activation_cache().encode_images(x), expected)
    for blocks in range(1, encoder.tower.depth + 1):
        tail, states = encoder.tail(blocks), encoder.trunk(x, blocks)
        torch.testing.assert_close(tail(states), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(tail.train()(states), expected, rtol=0, atol=1e-6)
        tail(states)[:, 0].sum().backward()
        trained = {name for name, weight in tail.named_parameters() if weight.grad is not None}
        assert trained == {name for name, _ in tail.named_parameters()}


NETS = {
    "ByobNet": "test_byobnet", "ConvNeXt": "test_convnext", "EfficientNet": "tf_efficientnet_lite0",
    "RegNet": "regnetx_002", "ResNet": "test_resnet",
}  # fmt: skip


def test_every_chain_is_tested() -> None:
    assert NETS.keys() == CHAINS.keys()


@pytest.mark.parametrize("family", NETS)
def test_the_layers_of_a_net_of_timm_are_timm_s_own_feature_maps(family: str, tmp_path: Path) -> None:
    encoder = build(tmp_path, timm_net(NETS[family]), CLIP_TEXT)
    tower = encoder.tower
    x = pixels_of().contiguous(memory_format=tower.memory_format)
    assert tower.kind == f"timm's {family}"
    expected = encoder.image_features(x)
    torch.testing.assert_close(encoder.tail(1)(encoder.trunk(x, 1)), expected, rtol=0, atol=1e-6)
    trunk: Any = tower.module.trunk
    _, maps = trunk.forward_intermediates(x)
    ours = [encoder._passed(x, {layer}).states[layer][0] for layer in range(tower.depth + 1)]
    assert len(maps) == len(ours)
    for mine, theirs, side in zip(ours, maps, tower.sides(SIZE), strict=True):
        assert torch.equal(mine, theirs) and mine.shape[-1] == side
    deepest = encoder.encode_layers(x, (tower.depth - 1,), 1)[:, encoder.dim :]
    torch.testing.assert_close(deepest, maps[-2].mean(dim=(2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", VITS[1:])
def test_the_layers_of_a_vit_of_timm_are_timm_s_own(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder, x = encoder_of(kind), pixels_of()
    trunk: Any = encoder.tower.module.trunk
    _, maps = trunk.forward_intermediates(x, norm=False)
    for layer, expected in enumerate(maps, 1):
        cells = encoder.encode_layers(x, (layer,), 4)[:, encoder.dim :]
        torch.testing.assert_close(cells, expected.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_a_grid_finer_than_the_maps_of_a_layer_is_refused(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = encoder_of(kind)
    assert encoder.encode_layers(pixels_of(), (0, 1), 4).shape[0] == 3
    with pytest.raises(
        ValueError, match=r"row: feature maps of layers \[1, 4\] on 4 x 4 cells.*Change layers"
    ):
        encoder.check_layers((1, 4), 4, "row")


def test_the_statistics_of_batch_normalisation_stay_frozen_in_a_training_tail(
    encoder_of: Callable[[str], ClipEncoder],
) -> None:
    encoder = encoder_of("ModifiedResNet")
    tail = encoder.tail(2).train()
    before = {name: value.clone() for name, value in tail.named_buffers()}
    assert before
    tail(encoder.trunk(pixels_of(), 2)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in tail.named_buffers())
    assert any(isinstance(m, nn.BatchNorm2d) and m.weight.grad is not None for m in tail.modules())


# --- low-rank updates and weight matrices ---------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
def test_low_rank_updates_equal_a_clip_with_merged_weights(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = encoder_of(kind)
    towers = LoraTowers(encoder, rank=2, alpha=3.0, dropout=0.25).eval()
    for update in towers.updates:
        nn.init.normal_(update.up, std=0.3)  # pyright: ignore[reportArgumentType]
    plain = dataclasses.replace(encoder, model=copy.deepcopy(encoder.model))
    blocks = [*plain.tower.blocks(), *plain.text_tower.blocks()]
    assert len(blocks) == len(towers.updates) == 3 + 2
    with torch.no_grad():
        for block, update in zip(blocks, towers.updates, strict=True):
            matrices = [matrix for weight in block.weights() for matrix in weight.matrices()]
            for matrix, a, b in zip(matrices, update.down, update.up, strict=False):  # pyright: ignore
                matrix.add_(3.0 / 2**0.5 * b @ a)
        views, texts = views_of("none", 2), [prompt for ensemble in PROMPTS for prompt in ensemble]
        x = encoder.preprocess(views)
        torch.testing.assert_close(towers(views), plain.encode_images(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(towers.encode_texts(texts), plain.encode_texts(texts), rtol=0, atol=1e-5)
        assert not torch.allclose(towers(views), encoder.encode_images(x), atol=1e-3)
        assert not torch.allclose(towers.encode_texts(texts), encoder.encode_texts(texts), atol=1e-3)


@pytest.mark.parametrize("kind", VITS)
def test_the_weights_of_a_block_are_those_of_its_attention_and_mlp(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = encoder_of(kind)
    model = copy.deepcopy(encoder.model)
    changed = dataclasses.replace(encoder, model=model)
    for before, after in ((encoder.tower, changed.tower), (encoder.text_tower, changed.text_tower)):
        for old, new in zip(before.blocks(), after.blocks(), strict=True):
            shapes = [matrix.shape for weight in new.weights() for matrix in weight.matrices()]
            assert shapes[:4] == [(new.width, new.width)] * 4  # q, k, v and the output
            assert shapes[4] == shapes[5][::-1] and shapes[4][0] > new.width
            for weight, source in zip(new.weights(), old.weights(), strict=True):
                with torch.no_grad():
                    weight.matrices().zero_()
                assert source.matrices().any()
    assert not torch.allclose(changed.encode_images(pixels_of()), encoder.encode_images(pixels_of()))
    assert not torch.allclose(changed.encode_texts(["a red"]), encoder.encode_texts(["a red"]))


# --- learned contexts -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
def test_contexts_that_start_at_words_are_those_words_in_every_text_tower(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    from medfocus.clip.prompt_learning import ContextTower, start_contexts, write_texts

    encoder = encoder_of(kind)
    contexts = start_contexts("coop", encoder, 4, "a photo of a", torch.Generator())
    tower = ContextTower(encoder, write_texts("coop", encoder, NAMES, 4))
    expected = encoder.encode_texts([f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(tower(contexts[None, None])[0], expected, rtol=0, atol=1e-5)
    moved = tower(contexts[None, None] + torch.randn(4, contexts.shape[1], generator=torch.Generator()))[0]
    assert not torch.allclose(moved, expected, atol=1e-3)


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
def test_the_attention_bias_acts_as_in_a_plain_softmax(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    """SDPA with the bias against matrices that are computed one by one."""
    encoder, x = encoder_of(kind).with_region("attention", 3.0), pixels_of("attention")
    bias = encoder.region.bias(encoder.tower, x)
    kept = encoder.tower.attended(x[:, :3], bias)
    torch.testing.assert_close(kept.features, encoder.encode_images(x), rtol=0, atol=1e-5)
    plain = encoder.tower.attended(x[:, :3])
    pairs = [*zip(kept.blocks, plain.blocks, strict=True)]
    moved = [not torch.allclose(biased[..., 0, :], raw[..., 0, :], atol=1e-3) for biased, raw in pairs]
    if kept.pool is None:
        assert all(moved)  # the class token
    else:
        assert not any(moved) and plain.pool is not None
        share = functional.avg_pool2d(x[:, 3:], 8).flatten(1)[:, None, None]  # m of each patch
        expected = plain.pool * (3.0 * share).exp()
        torch.testing.assert_close(kept.pool, expected / expected.sum(-1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", VITS)
def test_no_bias_and_a_channel_of_zeros_change_no_bit(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder, x = encoder_of(kind), pixels_of("attention")
    expected = encoder.encode_images(x[:, :3])
    assert torch.equal(encoder.with_region("attention", 0.0).encode_images(x), expected)
    assert torch.equal(encoder.with_region("alpha", 0.0).encode_images(x), expected)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_the_channel_of_a_convolutional_encoder_is_added_to_its_first_convolution(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = encoder_of(kind)
    x = pixels_of("alpha").contiguous(memory_format=encoder.tower.memory_format)
    regional = encoder.with_region("alpha", 0.0)
    torch.testing.assert_close(regional.encode_images(x), encoder.encode_images(x[:, :3]), rtol=0, atol=0)
    layer: Any = regional.model.visual.get_submodule(encoder.tower.first_conv)  # pyright: ignore
    nn.init.normal_(layer.alpha.weight)
    seen = (x[:, 3:] - 0.5) / 0.26
    expected = layer.conv(x[:, :3]) + layer.alpha(seen)
    maps: list[Tensor] = []
    hook = layer.register_forward_hook(lambda *parts: maps.append(parts[2]))
    assert not torch.allclose(regional.encode_images(x), encoder.encode_images(x[:, :3]), atol=1e-4)
    hook.remove()
    assert torch.equal(maps[0], expected)


# --- explanations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
def test_a_region_with_all_the_attention_gets_all_the_heat(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    from medfocus.explain.transformer import gradient_attention

    encoder, x = encoder_of(kind).with_region("attention", 1e3), pixels_of("attention", 2)
    x[:, 3] = 0
    x[:, 3, 8:16, 16:24] = 1.0  # the patch in row 1, column 2
    bias = encoder.region.bias(encoder.tower, x)
    # The patch lowers a feature or its negative, so one of the two scores rises.
    by_score = [
        gradient_attention(encoder.tower, x[:, :3], lambda f, sign=sign: sign * f[:, 0], bias)
        for sign in (1, -1)
    ]
    for i in range(2):
        sharper = max((maps[i] for maps in by_score), key=lambda heat: float(heat.std()))
        if kind == "ViT of timm with an attention pool":  # its patches have mixed before the pool
            assert np.unravel_index(int(sharper.argmax()), sharper.shape)[0] in range(8, 16)
        else:
            assert float(sharper[4:20, 12:28].sum()) > 0.95


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_grad_cam_of_a_convolutional_clip_is_the_formula(
    kind: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    from medfocus.explain.grad_cam import tower_grad_cam
    from medfocus.explain.maps import to_maps

    tower, x = encoder_of(kind).tower, pixels_of(count=2)
    maps = tower.embed(x)
    for number in range(1, tower.depth + 1):
        maps = tower.block(number, maps)
    maps = maps.detach().double()
    net = copy.deepcopy(tower.module).double()
    slope, step = torch.zeros_like(maps), 1e-5
    finish = type(tower)(net)
    for channel, row, column in np.ndindex(*maps.shape[1:]):
        moved = []
        for sign in (1, -1):
            nudged = maps.clone()
            nudged[:, channel, row, column] += sign * step
            moved.append(finish.pool(nudged)[:, 0].detach())
        slope[:, channel, row, column] = (moved[0] - moved[1]) / (2 * step)
    expected = (slope.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1)
    got = tower_grad_cam(tower, x, lambda features: features[:, 0])
    torch.testing.assert_close(got, to_maps(expected, SIZE), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("focus", ["alpha", "dual"])
def test_a_view_with_more_than_one_image_is_explained_by_occlusion(
    focus: str, encoder_of: Callable[[str], ClipEncoder]
) -> None:
    encoder = with_focus(encoder_of("net of timm"), focus)
    method = ClipZeroShot(encoder).load({"text_features": class_embeddings(encoder, PROMPTS)})
    _, way = explain(method, encoder, views_of(focus, 1), torch.tensor([0]))
    assert way == "occlusion"


# --- refusals before any work ---------------------------------------------------------------------


def test_a_study_is_refused_with_the_method_and_the_focus_before_any_work(
    encoder_of: Callable[[str], ClipEncoder],
) -> None:
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    resnet, vit = encoder_of("ModifiedResNet"), encoder_of("ViT of open_clip")

    def studied(**methods: tuple[str, ...]) -> Any:
        every = {params.report.baseline: ("none",), **methods}
        return dataclasses.replace(
            params, study=dataclasses.replace(params.study, methods=every, schedule="published")
        )

    check_towers(studied(medfocusclip=("none", "attention", "shuffled")), vit)
    check_towers(studied(medfocusclip=("none", "alpha", "dual", "crop")), resnet)
    with pytest.raises(
        TowerError,
        match=r"^params\.yaml: study\.methods\.medfocusclip with the focus 'attention': the image encoder .*"
        r"\(ModifiedResNet\) has no attention that a region can bias\. Use the focus alpha, dual, crop",
    ):
        check_towers(studied(medfocusclip=("none", "attention")), resnet)
    with pytest.raises(TowerError, match=r"study\.methods\.clip-lora with the focus 'none': .*Use clip-few"):
        check_towers(studied(**{"clip-lora": ("none",)}), resnet)


def test_the_classifier_in_python_is_refused_before_it_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_kind("ModifiedResNet", tmp_path)
    monkeypatch.setattr(MedFocusCLIP, "_masks", lambda *_: pytest.fail("segmented"))
    images = np.zeros((4, 40, 40, 3), np.uint8)
    classifier = MedFocusCLIP(
        method="clip-lora", clip=f"local-dir:{tmp_path}", pretrained="", segmenter="otsu"
    )
    with pytest.raises(TowerError, match=r"^MedFocusCLIP: clip-lora with the focus 'crop': .*ModifiedResNet"):
        classifier.fit(images, [0, 1, 0, 1])
