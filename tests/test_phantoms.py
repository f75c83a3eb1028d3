"""Phantoms have fixed bytes and known regions, and show their class only inside the region."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medfocus.phantoms import MODALITIES, Phantom, draw, generator, png, write

CLASSES = [(modality, label) for modality, labels in MODALITIES.items() for label in labels]
WITHOUT_LESION = {"normal", "no tumor"}
# sha256 of two images per class, 96 px, seed 0, with their regions
DRAWN = "a7d9c98d522ca161ee8e15207257e6719e73fc14bf784e072f61d4ac6e8e7f42"


def image_of(modality: str, label: str, index: int, size: int = 96) -> Phantom:
    return draw(modality, label, generator(0, modality, "train", label, index), size)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("modality", "label"), CLASSES)
def test_a_lesion_is_known_and_covers_one_to_twelve_percent(modality: str, label: str) -> None:
    for index in range(8):
        phantom = image_of(modality, label, index, 128)
        assert phantom.image.shape == phantom.region.shape == (128, 128)
        assert phantom.image.dtype == np.uint8 and phantom.region.dtype == np.bool_
        assert phantom.image.std() > 20, "an image shows something"
        if label in WITHOUT_LESION:
            assert not phantom.region.any()
            assert not {"region", "side", "size"} & phantom.findings.keys()
        else:
            assert 0.007 < phantom.region.mean() < 0.12
            assert phantom.findings.keys() >= {"finding", "region", "side", "size"}


def test_a_chest_lesion_lies_in_the_lung_that_its_findings_name() -> None:
    for label in ("nodule", "cavity", "consolidation"):
        for index in range(10):
            phantom = image_of("chest_xray", label, index)
            named = phantom.parts[f"{phantom.findings['side']} lung"]
            assert (phantom.region & named).sum() > 0.95 * phantom.region.sum()


def test_a_brain_tumor_lies_in_the_brain() -> None:
    for label in ("glioma", "meningioma", "pituitary tumor"):
        for index in range(10):
            phantom = image_of("brain_mri", label, index)
            assert (phantom.region & phantom.parts["brain"]).sum() > 0.75 * phantom.region.sum()


def test_a_drawn_set_has_the_same_bytes_on_every_machine() -> None:
    digest = hashlib.sha256()
    for modality, label in CLASSES:
        for index in range(2):
            phantom = image_of(modality, label, index)
            digest.update(png.encode(phantom.image) + png.encode(phantom.region))
    assert digest.hexdigest() == DRAWN


def test_a_png_is_stored_uncompressed_and_independent_of_zlib() -> None:
    written = png.encode(np.array([[7]], np.uint8))
    assert (
        written.hex()
        == (
            "89504e470d0a1a0a"  # signature
            "0000000d49484452000000010000000108000000003a7e9b55"  # IHDR: 1 x 1, 8 bits, grey
            "0000000d49444154"
            + "7801"
            + "01"
            + "0200fdff"
            + "0007"
            + "00090008"
            + "b9ac8687"  # one stored block
            "0000000049454e44ae426082"  # IEND
        )
    )


def test_pillow_reads_back_what_was_encoded() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 5), (300, 301)):  # the last needs more than one stored block
        pixels = rng.integers(0, 256, shape).astype(np.uint8)
        with Image.open(BytesIO(png.encode(pixels))) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), pixels)
        with Image.open(BytesIO(png.encode(pixels > 99))) as image:
            assert np.array_equal(np.asarray(image), np.where(pixels > 99, 255, 0))


def test_a_colour_image_is_refused_by_the_png_writer() -> None:
    with pytest.raises(ValueError, match=r"png: the image is uint8 \(4, 4, 3\); pass \(H, W\) uint8 or bool"):
        png.encode(np.zeros((4, 4, 3), np.uint8))


def test_each_image_of_a_written_set_can_be_drawn_alone(tmp_path: Path) -> None:
    write(tmp_path / "set", "brain_mri", seed=5, train_per_class=2, test_per_class=1, size=96)
    again = draw("brain_mri", "glioma", generator(5, "brain_mri", "train", "glioma", 1), 96)
    with Image.open(tmp_path / "set/train/glioma/00001.png") as image:
        assert np.array_equal(np.asarray(image), again.image)
    with Image.open(tmp_path / "set/masks/train/glioma/00001.png") as image:
        assert np.array_equal(np.asarray(image) > 0, again.region)


def test_a_larger_set_begins_with_the_same_images(tmp_path: Path) -> None:
    write(tmp_path / "set", "breast_ultrasound", seed=1, train_per_class=2, test_per_class=1, size=64)
    before = files_of(tmp_path / "set")
    write(tmp_path / "set", "breast_ultrasound", seed=1, train_per_class=3, test_per_class=2, size=64)
    after = files_of(tmp_path / "set")
    assert len(before) == 2 * 3 * (2 + 1) and len(after) == 2 * 3 * (3 + 2)
    assert before.items() <= after.items()


def test_train_and_test_share_no_image(tmp_path: Path) -> None:
    write(tmp_path / "set", "chest_xray", seed=1, train_per_class=3, test_per_class=3, size=64)
    images = [data for name, data in files_of(tmp_path / "set").items() if not name.startswith("masks/")]
    assert len(set(images)) == len(images) == 24


def test_a_failed_write_keeps_the_earlier_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set", "breast_ultrasound", seed=1, train_per_class=1, test_per_class=0, size=64)
    before = files_of(tmp_path)

    def full_disk(image: np.ndarray) -> bytes:
        raise OSError("No space left on device")

    monkeypatch.setattr(png, "encode", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "set", "breast_ultrasound", seed=2, train_per_class=9, test_per_class=9, size=64)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"], "nothing half-written is left beside it"


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"holds 'thesis.tex'.* would be deleted\. Give an empty or a new folder\."
    ):
        write(tmp_path, "brain_mri", seed=0, train_per_class=1, test_per_class=1)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(
        ValueError, match="no modality 'x_ray'; use one of chest_xray, brain_mri, breast_ultrasound"
    ):
        draw("x_ray", "normal", rng)
    with pytest.raises(
        ValueError, match="breast_ultrasound has no class 'normal'; use one of benign, malignant, cyst"
    ):
        draw("breast_ultrasound", "normal", rng)
    with pytest.raises(ValueError, match="a size of 32 px is too small to draw on; use 64 or more"):
        draw("brain_mri", "glioma", rng, size=32)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_class_is_visible_in_the_region_and_hardly_elsewhere(modality: str) -> None:
    """Mean over five draws of ten images per class: only the pixels of the region reveal the class."""
    labels = [label for label in MODALITIES[modality] if label not in WITHOUT_LESION]
    drawn = [[image_of(modality, label, index) for index in range(50)] for label in labels]
    y = np.repeat(np.arange(len(labels)), 50)

    def accuracy(view: Callable[[Phantom], np.ndarray]) -> float:
        x = np.stack([pixels(view(phantom)) for phantoms in drawn for phantom in phantoms])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
        scores = []
        for first in range(0, 50, 10):
            train = np.tile((np.arange(50) >= first) & (np.arange(50) < first + 10), len(labels))
            scores.append(classifier.fit(x[train], y[train]).score(x[~train], y[~train]))
        return float(np.mean(scores))

    whole, background, region = accuracy(lambda p: p.image), accuracy(without_region), accuracy(crop)
    assert whole < 0.45 and background < 0.45, "chance is 0.33"
    assert region > whole + 0.25


def pixels(image: np.ndarray) -> np.ndarray:
    """An image of any size as 24 x 24 grey pixels, (576,)."""
    return np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BOX), float).ravel() / 255


def crop(phantom: Phantom) -> np.ndarray:
    """The box around the known region."""
    rows, columns = (np.flatnonzero(phantom.region.any(axis)) for axis in (1, 0))
    return phantom.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def without_region(phantom: Phantom) -> np.ndarray:
    """The image with the box around the region filled with the mean, so that the outline is hidden too."""
    rows, columns = (np.flatnonzero(phantom.region.any(axis)) for axis in (1, 0))
    rest = phantom.image.copy()
    rest[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = int(phantom.image.mean())
    return rest
