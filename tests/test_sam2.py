"""Claims about SAM2 as a segmenter: prompts, fallback ladder, weights and configurations."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medfocus.masks import candidates
from medfocus.masks.otsu import OtsuSegmenter
from medfocus.masks.sam2.model import _read_config, load_predictor, size_fault, trained_size
from medfocus.masks.sam2.segmenter import (
    NO_PROMPT,
    PointPrompts,
    Sam2Segmenter,
    box_prompt,
    grid_prompts,
    load_sam2,
)
from medfocus.masks.settings import STRATEGIES, OtsuSettings, Sam2Settings
from medfocus.storage import weights
from tests.segmenters import amplify, assert_sound, awkward_images, disc, noise

TINY = "configs/sam2.1/sam2.1_hiera_t.yaml"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM2.1-tiny with video modules and random weights, in the published format."""
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(str(sam2.__path__[0])) / TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = instantiate(config.model, _recursive_=True)
    amplify(model)
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:masks.image_size is 256")  # SAM2.1-tiny here, for speed


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Sam2Segmenter:
    """SAM2.1-tiny, loaded from the checkpoint, at 256 px for speed."""
    return load_sam2(
        Sam2Settings(
            TINY, str(tiny_checkpoint), 256, "grid", points_per_side=2, min_iou=0.1, min_stability=0.1
        )
    )


@pytest.fixture
def pocket() -> Callable[..., Sam2Segmenter]:
    """Builds pocket segmenters of random weights with amplified masks."""

    def build(strategy: str = "grid", batch_size: int = 4, keep: int = 1) -> Sam2Segmenter:
        predictor, key = load_predictor("pocket", "random:0", 128)
        amplify(predictor.model)
        settings = Sam2Settings(
            *("pocket", "random:0", 128, strategy),
            points_per_side=3,
            keep=keep,
            min_iou=0.1,
            min_stability=0.1,
        )
        return Sam2Segmenter(predictor, key, settings, batch_size)

    return build


def test_full_size_sam2_loads_from_the_published_format_and_segments_every_shape(tiny: Sam2Segmenter) -> None:
    images = awkward_images()
    masks = tiny.segment(images)
    assert_sound(masks, images)
    assert {mask.status for mask in masks} >= {"chosen"}


def test_decoding_all_points_at_once_gives_the_predictors_own_logits(tiny: Sam2Segmenter) -> None:
    image = noise(120, 200)
    prompts = grid_prompts(2)
    logits, iou = tiny.decode(tiny.encode([noise(50, 50, 1), image]), 1, prompts)
    assert logits.shape == (12, 64, 64)
    assert iou.shape == (12,)
    tiny.predictor.set_image(image)
    for point in range(4):
        expected_masks, expected_iou, expected = tiny.predictor.predict(
            prompts.coords[point] * (200, 120),
            prompts.labels[point],
            multimask_output=True,
            return_logits=True,
        )
        mine = slice(3 * point, 3 * point + 3)
        assert np.allclose(np.clip(logits[mine], -32, 32), expected, atol=1e-3)
        assert np.allclose(iou[mine], expected_iou, atol=1e-5)
        full = torch.nn.functional.interpolate(
            torch.from_numpy(logits[mine])[None], (120, 200), mode="bilinear"
        )
        assert np.allclose(full[0].numpy(), expected_masks, atol=2e-3)


def test_box_prompt_is_the_predictors_own_box(tiny: Sam2Segmenter) -> None:
    image = noise(100, 60)
    logits, _ = tiny.decode(tiny.encode([image]), 0, box_prompt(0.5))
    tiny.predictor.set_image(image)
    _, _, expected = tiny.predictor.predict(box=np.array([15, 25, 45, 75]), multimask_output=True)
    assert np.allclose(np.clip(logits, -32, 32), expected, atol=1e-3)


def test_decoding_in_chunks_changes_nothing(tiny: Sam2Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    features = tiny.encode([noise(64, 64)])
    whole, iou = tiny.decode(features, 0, tiny.prompts)
    monkeypatch.setattr("medfocus.masks.sam2.segmenter._DECODE_BYTES", 1)  # one point at a time
    chunked, chunked_iou = tiny.decode(features, 0, tiny.prompts)
    assert np.allclose(whole, chunked, atol=1e-3)
    assert np.allclose(iou, chunked_iou, atol=1e-5)


def test_a_mask_does_not_depend_on_other_images_of_the_batch(tiny: Sam2Segmenter) -> None:
    images = [noise(60, 80, seed) for seed in range(5)]
    together = tiny.segment(images)
    backwards = tiny.segment(images[::-1])[::-1]
    for a, b in zip(together, backwards, strict=True):
        assert (a.region != b.region).mean() < 0.001
        assert a.score == pytest.approx(b.score, abs=1e-4)


def test_the_images_aspect_does_not_move_the_mask(tiny: Sam2Segmenter) -> None:
    square = noise(256, 256)
    a, b = tiny.segment([square, square.repeat(2, axis=1)])
    widened = a.region.repeat(2, axis=1)
    assert (widened & b.region).sum() / (widened | b.region).sum() > 0.9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_one_sound_mask_per_image(
    pocket: Callable[..., Sam2Segmenter], strategy: str
) -> None:
    images = awkward_images()
    assert_sound(pocket(strategy).segment(images), images)


@pytest.mark.parametrize("strategy", ["automatic", "grid"])
def test_without_a_stable_mask_the_ladder_ends_on_the_last_rung(strategy: str) -> None:
    segmenter = load_sam2(Sam2Settings("pocket", "random:0", 128, strategy, points_per_side=2))
    (mask,) = segmenter.segment([noise(40, 40)])
    assert mask.status == "identity"
    assert mask.score == 0
    assert mask.coverage == 1


def test_automatic_chooses_among_sam2s_own_proposals(pocket: Callable[..., Sam2Segmenter]) -> None:
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    segmenter, image = pocket("automatic"), noise(96, 128)
    (mask,) = segmenter.segment([image])
    with pytest.warns(FutureWarning, match="script"):
        generator = SAM2AutomaticMaskGenerator(
            segmenter.model, points_per_side=3, pred_iou_thresh=0.1, stability_score_thresh=0.1
        )
    generator.predictor = segmenter.predictor  # at 128 px; the generator's own is made for 1024
    proposals = [candidates.tidy(one["segmentation"]) for one in generator.generate(image)]
    assert mask.status == "chosen"
    assert any(np.array_equal(mask.region, proposal) for proposal in proposals)


def test_interest_needs_one_decode_of_no_prompt(pocket: Callable[..., Sam2Segmenter]) -> None:
    segmenter = pocket("interest")
    asked = scripted(segmenter, [(as_logits(disc(0.5, 0.5, 0.2, 32)), np.array([0.9]))])
    segmenter.segment([noise(64, 64)])
    assert [prompts.labels.tolist() for prompts in asked] == [[[NO_PROMPT]]]


def test_no_prompt_has_no_place(pocket: Callable[..., Sam2Segmenter]) -> None:
    segmenter = pocket("interest")
    features, prompts = segmenter.encode([noise(64, 64)]), segmenter.prompts
    anywhere = PointPrompts(prompts.coords + np.float32(0.7), prompts.labels)
    here, there = (segmenter.decode(features, 0, each) for each in (prompts, anywhere))
    assert np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1])


def test_the_region_of_interest_is_one_candidate_wherever_it_lies(
    pocket: Callable[..., Sam2Segmenter],
) -> None:
    corner, centre = disc(0.15, 0.15, 0.14, 32), disc(0.5, 0.5, 0.14, 32)
    for strategy, expected in (("interest", corner), ("grid", centre)):
        segmenter = pocket(strategy, keep=2)
        scripted(segmenter, [(as_logits(centre, corner), np.array([0.8, 0.9]))])
        rung = segmenter.ladder(segmenter.encode([noise(64, 64)]), 0)
        assert np.array_equal(rung.logits[0] > 0, expected)
        assert len(rung.logits) == (1 if strategy == "interest" else 2)
        assert strategy != "interest" or rung.score == pytest.approx(0.9)


def test_a_published_sam2_has_no_region_of_interest() -> None:
    message = r"masks\.strategy is 'interest', but .* 'sam2\.1_hiera_t' has not learnt .* Set .* to grid\."
    with pytest.raises(ValueError, match=message):
        load_sam2(Sam2Settings("sam2.1_hiera_t", "random:0", 256, "interest"))


def test_center_is_a_grid_of_one_point() -> None:
    prompts = grid_prompts(1)
    assert prompts.coords.tolist() == [[[0.5, 0.5]]]
    assert grid_prompts(4).coords.shape == (16, 1, 2)
    assert grid_prompts(2).coords[:, 0].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def scripted(segmenter: Sam2Segmenter, answers: list[tuple[np.ndarray, np.ndarray]]) -> list[PointPrompts]:
    """Make ``decode`` return ``answers`` in turn; return the list of its prompts."""
    asked: list[PointPrompts] = []

    def decode(features: object, index: int, prompts: PointPrompts) -> tuple[np.ndarray, np.ndarray]:
        asked.append(prompts)
        return answers[len(asked) - 1]

    segmenter.decode = decode  # pyright: ignore
    return asked


def as_logits(*regions: np.ndarray) -> np.ndarray:
    return np.where(np.stack(regions), 8.0, -8.0).astype(np.float32)


def test_the_ladder_goes_from_chosen_through_relaxed_and_box_to_identity(
    pocket: Callable[..., Sam2Segmenter],
) -> None:
    good, poor = np.array([0.9]), np.array([0.05])
    region, nothing = as_logits(disc(0.5, 0.5, 0.2, 32)), as_logits(np.zeros((32, 32), dtype=bool))
    rungs = {
        "chosen": [(region, good)],
        "relaxed": [(region, poor)],
        "box": [(nothing, good), (region, good)],
        "identity": [(nothing, good), (nothing, good)],
    }
    for status, answers in rungs.items():
        segmenter = pocket()
        asked = scripted(segmenter, answers)
        (mask,) = segmenter.segment([noise(64, 64)])
        assert mask.status == status
        assert len(asked) == len(answers)
        if len(asked) == 2:
            assert asked[1].coords.tolist() == [[[0, 0], [1, 1]]]
            assert asked[1].labels.tolist() == [[2, 3]]
        if status != "identity":
            truth = disc(0.5, 0.5, 0.2)
            assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_win(pocket: Callable[..., Sam2Segmenter], bad: float) -> None:
    broken, sound = as_logits(disc(0.5, 0.5, 0.2, 32)), as_logits(disc(0.3, 0.3, 0.2, 32))
    broken[0, 16, 16] = bad
    segmenter = pocket()
    scripted(segmenter, [(np.concatenate([broken, sound]), np.array([1.0, 0.8]))])
    (mask,) = segmenter.segment([noise(64, 64)])
    truth = disc(0.3, 0.3, 0.2)
    assert (mask.region & truth).sum() / (mask.region | truth).sum() > 0.9


@pytest.mark.parametrize("strategy", ["interest", "automatic", "grid"])
def test_nan_weights_give_the_whole_image(pocket: Callable[..., Sam2Segmenter], strategy: str) -> None:
    segmenter = pocket(strategy)
    with torch.no_grad():
        segmenter.model.sam_mask_decoder.iou_token.weight.fill_(float("nan"))
    (mask,) = segmenter.segment([noise(32, 32)])
    assert mask.status == "identity"


def test_a_region_smaller_than_a_pixel_falls_down_the_ladder(
    pocket: Callable[..., Sam2Segmenter],
) -> None:
    segmenter = pocket()
    speck = as_logits(disc(0.52, 0.52, 0.06, 32))
    nothing = as_logits(np.zeros((32, 32), dtype=bool))
    scripted(segmenter, [(speck, np.array([0.9])), (nothing, np.array([0.9]))])
    (mask,) = segmenter.segment([noise(2, 2)])
    assert mask.status == "identity"


def test_video_modules_may_be_missing_and_do_not_change_the_key(
    tiny_checkpoint: Path, tiny: Sam2Segmenter, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = weights.load(tiny_checkpoint)
    video = ("memory_", "maskmem_", "no_mem_pos", "no_obj", "obj_ptr", "mask_downsample")
    image_modules = {k: v for k, v in state.items() if not k.startswith(video)}
    assert len(image_modules) < len(state)
    save_file(image_modules, tmp_path / "image.safetensors")
    fast = load_sam2(
        Sam2Settings(
            "sam2.1_hiera_tiny",
            str(tmp_path / "image.safetensors"),
            256,
            "grid",
            points_per_side=2,
            min_iou=0.1,
            min_stability=0.1,
        )
    )
    assert fast.key == tiny.key
    images = [noise(70, 50)] * 4
    assert np.array_equal(fast.segment(images)[0].region, tiny.segment(images)[0].region)


def test_a_checkpoint_without_all_image_modules_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = weights.load(tiny_checkpoint)
    del state["sam_mask_decoder.iou_token.weight"]
    torch.save({"model": state}, tmp_path / "half.pt")
    message = (
        r"SAM2 checkpoint .*half.pt does not fit the config 'sam2.1_hiera_t': 1 of \d+ tensors differ "
        r"\(sam_mask_decoder.iou_token.weight is missing\). Set masks.config to the configuration of these"
    )
    with pytest.raises(ValueError, match=message):
        load_predictor("sam2.1_hiera_t", str(tmp_path / "half.pt"), 256)


def test_a_checkpoint_of_another_size_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit the config 'pocket': \d+ of \d+ tensors differ"):
        load_predictor("pocket", str(tiny_checkpoint), 128)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"masks.checkpoint \(SAM2\).*nowhere.pt"):
        load_predictor("pocket", str(tmp_path / "nowhere.pt"), 128)


def test_the_pocket_config_has_under_five_million_parameters_and_no_video() -> None:
    predictor, _ = load_predictor("pocket", "random:0", 128)
    names = [name for name, _ in predictor.model.named_parameters()]
    assert 4e6 < sum(parameter.numel() for parameter in predictor.model.parameters()) < 5e6
    assert not [name for name in names if name.startswith(("memory_", "obj_ptr", "mask_downsample"))]


def test_random_weights_depend_on_their_seed_and_leave_the_callers_generator_unchanged() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (_, a), (_, b), (_, c) = (load_predictor("pocket", f"random:{seed}", 128) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert a == b != c


def test_weights_config_and_settings_change_the_key() -> None:
    def key(batch_size: int = 4, **changed: Any) -> str:
        usual = {"config": "pocket", "checkpoint": "random:0", "image_size": 128, "strategy": "grid"}
        return load_sam2(Sam2Settings(**{**usual, **changed}), batch_size=batch_size).key

    changes: list[dict[str, Any]] = [
        {},
        {"checkpoint": "random:1"},
        {"image_size": 256},
        {"strategy": "interest"},
        {"strategy": "center"},
        {"points_per_side": 5},
        {"keep": 2},
        {"min_area": 0.02},
        {"max_area": 0.6},
        {"min_iou": 0.6},
        {"min_stability": 0.6},
        {"max_overlap": 0.2},
        {"box_side": 0.8},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(batch_size=1)
    assert OtsuSegmenter().key not in keys
    assert OtsuSegmenter().key != OtsuSegmenter(OtsuSettings(keep=2)).key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 130}, "image_size is 130; SAM2 takes multiples of 32 pixels. Use 128."),
        ({"checkpoint": "random:x"}, "checkpoint is 'random:x'. For random weights use random:0"),
        (
            {"strategy": "points"},
            "Unknown mask strategy 'points'; known: interest, automatic, grid, center, box.",
        ),
        ({"keep": 0}, "keep is 0; use 1 or more."),
        ({"box_side": 1.5}, r"box_side is 1.5; use a share of the image in \(0, 1\]."),
    ],
)
def test_a_setting_out_of_range_is_named_with_the_fix(settings: dict[str, object], message: str) -> None:
    usual = {"config": "pocket", "checkpoint": "random:0", "image_size": 128, "strategy": "grid"}
    with pytest.raises(ValueError, match=message):
        load_sam2(Sam2Settings(**{**usual, **settings}))  # pyright: ignore[reportArgumentType]


def test_without_an_image_size_sam2_takes_that_of_its_configuration(tmp_path: Path) -> None:
    predictor, key = load_predictor("pocket", "random:0", None)
    assert predictor.model.image_size == 256
    assert key == load_predictor("pocket", "random:0", 256)[1]
    assert {trained_size(f"sam2.1_hiera_{size}") for size in ("t", "s", "b+", "l")} == {1024}
    segmenters = [load_sam2(Sam2Settings("pocket", "pocket", size, "grid")) for size in (None, 256)]
    assert segmenters[0].key == segmenters[1].key
    shipped = Path(candidates.__file__).parents[1] / "configs" / "sam2_pocket.yaml"
    (tmp_path / "smaller.yaml").write_text(shipped.read_text().replace("image_size: 256", "image_size: 128"))
    assert load_predictor(str(tmp_path / "smaller.yaml"), "random:0", None)[0].model.image_size == 128


def test_a_size_far_from_the_training_s_is_said_with_both_numbers(tiny_checkpoint: Path) -> None:
    expected = (
        "masks.image_size is 128, but the weights of the configuration sam2.1_hiera_t were trained at "
        "1024 px, so expect poor masks. Set it to null for 1024 px."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
        load_predictor("sam2.1_hiera_t", str(tiny_checkpoint), 128)
    near = [size_fault("sam2.1_hiera_t", size) for size in (None, 512, 1024, 2048)]
    assert near == [""] * 4 and size_fault("pocket", 1024)


def test_weights_in_the_format_of_transformers_are_named(tmp_path: Path) -> None:
    torch.save({"vision_encoder.backbone.blocks.0": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"in the format of the package transformers, not of sam2\. Use the"):
        load_predictor("pocket", str(tmp_path / "model.pt"), None)


def test_an_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"SAM2 config 'sam3'.*Known: pocket, .*sam2.1_hiera_t"):
        load_predictor("sam3", "random:0", 128)


def test_a_yaml_file_needs_a_model_section(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("trainer: {}\n")
    with pytest.raises(ValueError, match=r"empty.yaml' has no section 'model' with a '_target_'"):
        load_predictor(str(tmp_path / "empty.yaml"), "random:0", 128)
    shipped = Path(candidates.__file__).parents[1] / "configs" / "sam2_pocket.yaml"
    shutil.copy(shipped, tmp_path / "mine.yaml")
    _, mine = load_predictor(str(tmp_path / "mine.yaml"), "random:0", 128)
    assert mine == load_predictor("pocket", "random:0", 128)[1]


@pytest.mark.parametrize(
    "asked",
    [
        "{_target_: os.system, _args_: ['touch ran']}",
        "{_target_: sam2.build_sam.os.system, _args_: ['touch ran']}",  # an import of a file of sam2
        "{_target_: sam2.build_sam.build_sam2, config_file: x}",
        "{_target_: sam2.modeling.sam2_base.trunc_normal_}",
        "{_target_: medfocus.masks.sam2.trunk.nn.Conv2d}",  # the one class of ours is a trunk
        "[{deeper: [{_target_: os.system, _args_: ['touch ran']}]}]",
        "'${oc.create:{_target_:os.system,_args_:[touch ran]}}'",
        "'\\${oc.create:{_target_:os.system,_args_:[touch ran]}}'",  # one resolution leaves the call
    ],
)
def test_a_config_builds_modules_of_sam2_and_calls_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(candidates.__file__).parents[1] / "configs" / "sam2_pocket.yaml"
    (tmp_path / "mine.yaml").write_text(f"{shipped.read_text()}  extra: {asked}\n")
    refused = r"asks to build .*which is no module of sam2\.modeling; it was refused because .*Start from"
    with pytest.raises(ValueError, match=refused):
        load_predictor(str(tmp_path / "mine.yaml"), "random:0", 128)
    assert not (tmp_path / "ran").exists()


def test_every_config_of_the_sam2_package_is_accepted() -> None:
    import sam2

    configs = sorted(Path(str(sam2.__path__[0])).glob("configs/sam2*/sam2*_hiera_*.yaml"))
    configs = [config for config in configs if "training" not in str(config)]
    assert len(configs) == 8
    assert all(_read_config(str(config), 128) for config in configs)
