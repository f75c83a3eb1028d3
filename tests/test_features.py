"""Views, and features with and without a cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medfocus.clip import features
from medfocus.clip.build import build_clip
from medfocus.clip.features import encode
from medfocus.focus.augment import ANGLE, SIDE, STRETCH, Augmentation, augmentation
from medfocus.focus.modes import FOCUS
from medfocus.focus.view import view, view_key
from medfocus.images.decode import read
from medfocus.images.geometry import CLIP_MEAN, Frame
from medfocus.storage import shards as shards_module
from tests.conftest import ROOT, run_forked

SHA = hashlib.sha256(b"an image").hexdigest()
ITEMS = list(range(23))
KEYS = [f"image {i}" for i in ITEMS]


# Views


def image(height: int = 60, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def region(height: int = 60, width: int = 40) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[20:40, 10:30] = True
    return mask


def test_view_zero_is_the_whole_image_and_needs_no_mask_without_focus() -> None:
    whole = view(
        image(), None, focus="none", frame=Frame(32), feather=0.02, change=augmentation(SHA, 0, mirror=True)
    )
    assert np.array_equal(whole, Frame(32).image(image()))
    assert np.array_equal(whole, view(image(), region(), focus="none", frame=Frame(32), feather=0.02))


def test_the_padding_has_clips_mean_colour() -> None:
    seen = view(image(), region(), focus="multiply", frame=Frame(30), feather=0)
    assert seen.shape == (30, 30, 3) and seen.dtype == np.uint8
    assert (seen[:, :5] == CLIP_MEAN).all() and (seen[:, -5:] == CLIP_MEAN).all()


@pytest.mark.parametrize("focus", [mode for mode in FOCUS if mode != "none"])
def test_a_focus_without_a_mask_is_refused(focus: str) -> None:
    with pytest.raises(ValueError, match=rf"focus '{focus}' needs a mask, and this image has none\. Make"):
        view(image(), None, focus=focus, frame=Frame(32), feather=0.02)


def test_an_augmentation_is_reproducible_and_within_its_ranges() -> None:
    drawn = [augmentation(SHA, number) for number in range(1, 200)]
    assert drawn == [augmentation(SHA, number) for number in range(1, 200)]
    assert len(set(drawn)) == len(drawn)
    assert augmentation(hashlib.sha256(b"another").hexdigest(), 1) != drawn[0]
    angles = [abs(change.angle) for change in drawn]
    sides = [(change.width * change.height) ** 0.5 for change in drawn]
    assert max(angles) <= ANGLE < 1.1 * max(angles)
    assert SIDE[0] <= min(sides) < 0.8 and 1.05 < max(sides) <= SIDE[1]
    assert all(max(change.width / change.height, change.height / change.width) <= STRETCH for change in drawn)


def test_views_are_mirrored_only_on_request() -> None:
    assert not any(augmentation(SHA, number).mirrored for number in range(100))
    mirrored = [augmentation(SHA, number, mirror=True).mirrored for number in range(100)]
    assert not mirrored[0] and 30 < sum(mirrored) < 70
    for number in range(100):
        assert augmentation(SHA, number, mirror=True)[:6] == augmentation(SHA, number)[:6]


def test_a_mirrored_view_is_the_mirror_image_of_the_same_view() -> None:
    change = augmentation(SHA, 1)
    mirrored = change._replace(mirrored=True)
    assert np.array_equal(mirrored.image(image()), change.image(image())[:, ::-1])
    assert np.array_equal(mirrored.mask(region()), change.mask(region())[:, ::-1])


def test_a_window_of_half_the_size_in_a_corner_shows_that_corner_twice_as_large() -> None:
    corner = Augmentation(width=0.5, height=0.5, right=-0.25, down=0.25)
    assert np.array_equal(corner.mask(region()), region()[30:, :20].repeat(2, axis=0).repeat(2, axis=1))


def test_a_rotation_by_a_quarter_turns_the_image() -> None:
    turned = Augmentation(angle=90).image(image(40, 40)).astype(int)
    assert np.abs(turned - np.rot90(image(40, 40)))[1:-1, 1:-1].max() <= 1


def test_outside_the_image_is_padding_and_outside_the_mask_is_no_region() -> None:
    wide = Augmentation(width=1.5, height=1.5)
    seen = wide.image(np.zeros((60, 60, 3), np.uint8), (9, 8, 7))
    assert (seen[:8] == (9, 8, 7)).all() and not seen[12:-12, 12:-12].any()
    assert not wide.mask(np.ones((60, 60), bool))[:8].any()


def test_a_tone_curve_keeps_black_and_white_and_changes_no_mask() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    darker = Augmentation(gamma=1.3).image(ramp)
    assert (darker[0, [0, 255]] == ramp[0, [0, 255]]).all() and (darker[0, 1:250] < ramp[0, 1:250]).all()
    assert np.array_equal(Augmentation(gamma=1.3).mask(region()), region())


@pytest.mark.parametrize("focus", FOCUS)
def test_image_and_mask_are_changed_together_and_before_the_focus(focus: str) -> None:
    change = Augmentation(10, 0.9, 0.8, 0.02, -0.03, 1.2, mirrored=True)
    changed, mask = change.image(image()), change.mask(region())
    expected = view(changed, mask, focus=focus, frame=Frame(48), feather=0.02)
    assert np.array_equal(
        view(image(), region(), focus=focus, frame=Frame(48), feather=0.02, change=change), expected
    )


def test_a_change_that_would_hide_the_region_shows_the_whole_image() -> None:
    away = Augmentation(width=0.5, height=0.5, down=0.4, gamma=1.2, mirrored=True)
    seen = view(image(), region(), focus="multiply", frame=Frame(48), feather=0, change=away)
    whole = Augmentation(gamma=1.2, mirrored=True)
    expected = view(image(), region(), focus="multiply", frame=Frame(48), feather=0, change=whole)
    assert np.array_equal(seen, expected)
    everywhere = np.ones_like(region())
    assert away.keeping(everywhere) == whole  # a quarter of the mask stays, however large it is shown
    assert augmentation(SHA, 3).keeping(region()) == augmentation(SHA, 3)


def test_each_view_setting_changes_the_key() -> None:
    settings: dict[str, Any] = {"focus": "multiply", "frame": Frame(96), "feather": 0.02}
    keys = {
        view_key(**settings),
        view_key(**{**settings, "focus": "crop"}),
        view_key(**{**settings, "frame": Frame(98)}),
        view_key(**{**settings, "frame": Frame(96, "shortest")}),
        view_key(**{**settings, "frame": Frame(96, interpolation="bilinear")}),
        view_key(**{**settings, "frame": Frame(96, padding=(0, 0, 0))}),
        view_key(**{**settings, "feather": 0.0}),
        view_key(**settings, fill="black"),
    }
    assert len(keys) == 8 and view_key(**settings) in keys


# Features


def make_view(item: int) -> np.ndarray:
    return np.full((4, 4, 3), item, dtype=np.uint8)


def mean_and_square(views: Tensor) -> Tensor:
    mean = views.float().mean(dim=(1, 2, 3))
    return torch.stack([mean, mean**2], dim=1)  # (B, 2)


def run(
    cache: Path | None,
    *,
    items: list[int] = ITEMS,
    keys: list[str] | None = None,
    make_view: Callable[[int], np.ndarray] = make_view,
    encode_batch: Callable[[Tensor], Tensor] = mean_and_square,
    settings: str = "encoder",
    batch_size: int = 5,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    return encode(
        items,
        [f"image {item}" for item in items] if keys is None else keys,
        make_view,
        encode_batch,
        cache=cache,
        settings=settings,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
    )


def never(_: object) -> np.ndarray:
    raise AssertionError("computed again")


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.zip"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_the_same_with_or_without_cache_and_in_the_order_of_the_items(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    uncached, cold = run(None, dtype=dtype), run(tmp_path, dtype=dtype)
    warm = run(tmp_path, dtype=dtype, make_view=never)
    assert uncached.dtype == dtype and uncached[:, 0].tolist() == ITEMS
    assert torch.equal(uncached, cold) and torch.equal(uncached, warm)
    backwards = run(tmp_path, items=ITEMS[::-1], dtype=dtype, make_view=never)
    assert torch.equal(backwards, uncached.flip(0))


def test_tokens_are_cached_like_features(tmp_path: Path) -> None:
    def tokens(views: Tensor) -> Tensor:
        return mean_and_square(views)[:, None, :].expand(-1, 7, -1) / 3  # (B, 7, 2)

    cold = run(tmp_path, encode_batch=tokens, dtype=torch.float16)
    assert cold.shape == (23, 7, 2)
    assert torch.equal(run(tmp_path, make_view=never, dtype=torch.float16), cold)


def test_only_missing_features_are_computed_and_equal_keys_once(tmp_path: Path) -> None:
    made: list[int] = []

    def counted(item: int) -> np.ndarray:
        made.append(item)
        return make_view(item)

    run(tmp_path, items=[1, 2, 3], make_view=counted)
    result = run(tmp_path, items=[2, 5, 3, 5, 6], make_view=counted)
    assert sorted(made) == [1, 2, 3, 5, 6]
    assert result[:, 0].tolist() == [2, 5, 3, 5, 6]


def test_other_settings_or_another_type_share_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    for settings, dtype in (("another", torch.float32), ("encoder", torch.float16)):
        with pytest.raises(AssertionError, match="computed again"):
            run(tmp_path, settings=settings, dtype=dtype, make_view=never)


def test_progress_counts_every_item_with_or_without_cache(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    run(tmp_path, items=[0, 1, 2, 3], progress=lambda done, total: calls.append((done, total)))
    run(tmp_path, items=[0, 9, 1, 9, 8], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 4), (4, 4), (2, 5), (5, 5)]


def test_every_batch_has_the_full_size_so_that_rows_do_not_depend_on_the_cache() -> None:
    sizes: list[int] = []

    def counted(views: Tensor) -> Tensor:
        sizes.append(len(views))
        return mean_and_square(views)

    result = run(None, encode_batch=counted, batch_size=10)
    assert sizes == [10, 10, 10] and result[:, 0].tolist() == ITEMS


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_no_feature_by_more_than_rounding(batch_size: int) -> None:
    encoder = build_clip("pocket", "random:0")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(20)]
    results = [
        encode(
            list(range(20)),
            [str(i) for i in range(20)],
            images.__getitem__,
            lambda views: encoder.encode_images(encoder.preprocess(views)),
            cache=None,
            settings="",
            batch_size=size,
        )
        for size in (20, batch_size)
    ]
    assert torch.allclose(results[0], results[1], atol=1e-5, rtol=0)


def test_a_failing_image_ends_the_run_and_keeps_earlier_features(tmp_path: Path) -> None:
    def broken(item: int) -> np.ndarray:
        if item == 17:
            raise ValueError("scan17.png: cut short")
        return make_view(item)

    with pytest.raises(ValueError, match=r"scan17\.png: cut short"):
        run(tmp_path, make_view=broken)
    kept = run(tmp_path, items=ITEMS[:15], make_view=never)  # three full batches before the failure
    assert kept[:, 0].tolist() == ITEMS[:15]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]


def test_a_failing_model_leaves_no_thread_behind() -> None:
    def failing(views: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(None, encode_batch=failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("views")]


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not finite in torch\.float16, for image 0 or the next 4 items\. Check"
    ):
        run(tmp_path, encode_batch=lambda views: mean_and_square(views) + 1e6, dtype=torch.float16)
    assert shards(tmp_path) == []


def test_calls_without_items_or_with_too_few_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features: 0 items and 0 keys\. Pass one key for each item"):
        run(None, items=[])
    with pytest.raises(ValueError, match=r"features: 23 items and 1 keys"):
        run(None, keys=["a"])


def test_threads_make_views_ahead_of_the_model_up_to_a_bound() -> None:
    made, gaps = [], []

    def counted(item: int) -> np.ndarray:
        made.append(item)
        return make_view(item)

    def slow(views: Tensor) -> Tensor:
        time.sleep(0.02)
        gaps.append(len(made))
        return mean_and_square(views)

    run(None, items=list(range(100)), make_view=counted, encode_batch=slow, batch_size=10)
    taken = [10 * (i + 1) for i in range(10)]
    assert all(0 <= ready - used <= 10 for ready, used in zip(gaps, taken, strict=True))
    assert gaps[0] > taken[0]  # while the model ran


def killed_midway(cache: Path) -> None:
    shards_module.FLUSH_SECONDS = 0.0

    def fatal(views: Tensor) -> Tensor:
        if 12 in views[:, 0, 0, 0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return mean_and_square(views)

    run(cache, encode_batch=fatal)


def encode_all(cache: Path) -> None:
    shards_module.FLUSH_SECONDS = 0.0
    assert run(cache)[:, 0].tolist() == ITEMS


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python 3.12 warns about fork; spawn takes 10 s
def test_a_killed_run_continues_from_its_cache(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_midway, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -9
    made: list[int] = []
    result = run(tmp_path, make_view=lambda item: (made.append(item), make_view(item))[1])
    assert result[:, 0].tolist() == ITEMS
    assert sorted(made) == ITEMS[10:]


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python 3.12 warns about fork; spawn takes 10 s
def test_two_concurrent_processes_compute_the_same_features(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_forked, args=(encode_all, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert run(tmp_path, make_view=never)[:, 0].tolist() == ITEMS
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".zip"]


def test_real_images_get_the_features_of_a_plain_loop(shared_data: Path) -> None:
    paths = sorted((shared_data / "covid19").rglob("*.jp*g"))[::40]
    encoder = build_clip("pocket", "random:0")

    def whole(path: Path) -> np.ndarray:
        return view(read(path), None, focus="none", frame=encoder.frame, feather=0)

    result = encode(
        paths,
        [str(path) for path in paths],
        whole,
        lambda views: encoder.encode_images(encoder.preprocess(views)),
        cache=None,
        settings="",
        batch_size=4,
    )
    bare = torch.cat([encoder.encode_images(encoder.preprocess(whole(path)[None])) for path in paths])
    assert len(paths) > 3
    assert torch.allclose(result, bare, atol=1e-5)
    assert torch.linalg.matrix_rank(result) > 1  # different images, different features


# Several kinds of features of the same views


def test_kinds_encoded_together_equal_kinds_encoded_alone_and_share_the_views(tmp_path: Path) -> None:
    made: list[int] = []

    def make_view(item: int) -> np.ndarray:
        made.append(item)
        return np.full((2, 2, 3), item, dtype=np.uint8)

    def mean(views: Tensor) -> Tensor:
        return views.float().mean(dim=(1, 2))  # (B, 3)

    def flat(views: Tensor) -> Tensor:
        return views.flatten(1)  # (B, 12)

    shared = {"cache": tmp_path, "batch_size": 4}
    alone = encode(ITEMS, KEYS, make_view, mean, settings="mean", **shared)
    made.clear()
    kinds = [features.Kind(mean, "mean"), features.Kind(flat, "flat", torch.uint8)]
    means, flats = features.encode_together(ITEMS, KEYS, make_view, kinds, **shared)
    assert torch.equal(means, alone)
    assert torch.equal(flats, torch.tensor(ITEMS, dtype=torch.uint8)[:, None].expand(-1, 12))
    assert sorted(made) == ITEMS  # for the second kind; the cache has the first
    made.clear()
    features.encode_together(ITEMS, KEYS, make_view, kinds, **shared)
    assert made == []


PASSES = """
import flows, resource, torch
torch.set_num_threads(1)
net = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)))
pixels = torch.zeros(8, 8, 256, 256)
for number in range(8):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad():
        net(pixels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_the_layers_of_a_network_take_the_memory_of_earlier_ones() -> None:
    program = [sys.executable, "-c", PASSES]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 10_000  # page faults a pass; without the setting about 50,000
