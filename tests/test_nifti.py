"""A NIfTI volume becomes upright slices with one window, and its slices form one group."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medfocus.datasets.ingest import Ingested, IngestError, ingest
from medfocus.images import decode
from medfocus.images import nifti as reader
from medfocus.images.errors import ImageError
from tests.dicoms import nifti

# A head: x to the right, y to the front, z up; brightest at the patient's right, less at the front and top.
HEAD = np.zeros((12, 16, 9), np.int16)
HEAD[2:10, 2:14, 1:8] = 400
HEAD[8:10, 2:14, 1:8] = 1000
HEAD[2:10, 12:14, 1:8] = 700
HEAD[2:10, 2:14, 7] = 550

# Orientations of the same head in a file: swapped and flipped axes.
STORED = {
    "RAS": (lambda v: v, np.eye(4)),
    "LPS": (lambda v: v[::-1, ::-1], np.diag([-1.0, -1, 1, 1])),
    "RAI": (lambda v: v[:, :, ::-1], np.diag([1.0, 1, -1, 1])),
    "ASR": (
        lambda v: v.transpose(1, 2, 0),
        np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    ),
}


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_slices_are_upright_for_every_orientation_of_the_file(tmp_path: Path, form: str, name: str) -> None:
    turn, affine = STORED[form]
    file = nifti(tmp_path / name, np.ascontiguousarray(turn(HEAD)), affine)
    axial = decode.read(Path(f"{file}#z=4"))[..., 0]
    assert axial.shape == (16, 12)  # rows from front to back
    assert (axial[4:10, 2] == 255).all(), "the patient's right is on the left"
    assert (axial[2:4, 5:9] > axial[8, 6]).all(), "the front is up"
    coronal = decode.read(Path(f"{file}#y=5"))[..., 0]
    assert coronal.shape == (9, 12) and (coronal[3, 2], coronal[1, 6] > coronal[4, 6]) == (255, True)
    sagittal = decode.read(Path(f"{file}#x=4"))[..., 0]
    assert sagittal.shape == (9, 16) and (sagittal[4, 2] > sagittal[4, 8]) and sagittal[1, 8] > sagittal[4, 8]


def test_one_hot_voxel_does_not_change_the_window_of_the_volume(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 1001, (30, 30, 20)).astype(np.float32)
    voxels[..., 3] /= 4
    voxels[1, 1, 1], voxels[2, 2, 2] = 1e6, np.nan
    file = nifti(tmp_path / "x.nii", voxels)
    dim, bright = (decode.read(Path(f"{file}#z={z}"))[..., 0] for z in (3, 4))
    assert 25 < dim.mean() < 40 and 120 < bright.mean() < 135
    hot, hole = decode.read(Path(f"{file}#z=1"))[..., 0], decode.read(Path(f"{file}#z=2"))[..., 0]
    assert hot[30 - 1 - 1, 30 - 1 - 1] == 255 and hole[30 - 2 - 1, 30 - 2 - 1] == 0
    low, high = np.percentile(voxels[np.isfinite(voxels)], (1, 99))
    expected = np.clip((voxels[..., 4].T[::-1, ::-1] - low) / (high - low), 0, 1) * 255
    assert np.abs(bright - expected).max() <= 0.5


def test_only_the_sign_of_a_slope_matters(tmp_path: Path) -> None:
    plain = decode.read(Path(f"{nifti(tmp_path / 'a.nii', HEAD)}#z=4"))
    for slope, expected in ((3.0, plain), (-3.0, 255 - plain)):
        made = nibabel.Nifti1Image(HEAD, np.eye(4))
        made.header.set_slope_inter(slope, -7.0)
        data = made.to_bytes()
        header = (
            data[:112] + struct.pack("<ff", slope, -7.0) + data[120:352]
        )  # nibabel would overwrite the slope
        (tmp_path / "b.nii").write_bytes(header + HEAD.tobytes(order="F"))
        found = decode.read(Path(f"{tmp_path / 'b.nii'}#z=4"))
        assert np.abs(found.astype(int) - expected).max() <= 1  # rounding half to even


def test_nifti_two_and_a_single_slice(tmp_path: Path) -> None:
    nibabel.Nifti2Image(HEAD, np.eye(4)).to_filename(tmp_path / "two.nii.gz")
    plain = nifti(tmp_path / "one.nii", HEAD)
    assert np.array_equal(
        decode.read(Path(f"{tmp_path / 'two.nii.gz'}#z=4")), decode.read(Path(f"{plain}#z=4"))
    )
    single = nifti(tmp_path / "slice.nii", HEAD[:, :, 4:5])
    assert decode.decode(single.read_bytes(), "x").shape == (16, 12, 3), "the only one is meant"
    with pytest.raises(ImageError, match=r"^x: holds several images\."):
        decode.decode(plain.read_bytes(), "x")
    with pytest.raises(ImageError, match="has no slice 'z=9'; its last slices are x=11, y=15, z=8"):
        decode.read(Path(f"{plain}#z=9"))


def changed(data: bytes, place: int, form: str, *values: float) -> bytes:
    """A NIfTI-1 file with other values at an offset in its header."""
    return data[:place] + struct.pack(f"<{form}", *values) + data[place + struct.calcsize(f"<{form}") :]


@pytest.mark.parametrize(
    ("place", "form", "values", "fault"),
    [
        (40, "8h", (3, 12, 16, 900, 1, 1, 1, 1), "declares 345600 bytes of voxels but holds 3456"),
        (40, "8h", (3, 32000, 32000, 32000, 1, 1, 1, 1), "unpacks to more than 1000 MB"),
        (40, "8h", (3, 12, -16, 9, 1, 1, 1, 1), "has shape (12, -16, 9), which is not a volume"),
        (70, "2h", (128, 24), "has voxels of type RGB; only grey values are supported"),
        (70, "2h", (32, 64), "has voxels of type complex64; only grey values are supported"),
        (70, "2h", (999, 16), "cannot be decoded"),
        (108, "f", (float("nan"),), "cannot be decoded"),
        (108, "f", (1e9,), "declares 3456 bytes of voxels but holds 0"),
        (344, "4s", (b"ni1\0",), "has its voxels in a second file (.img)"),
    ],
)
def test_a_false_header_is_refused_with_the_reason(
    tmp_path: Path, place: int, form: str, values: tuple[Any, ...], fault: str
) -> None:
    data = changed(nifti(tmp_path / "x.nii", HEAD).read_bytes(), place, form, *values)
    with pytest.raises(ImageError) as caught:
        decode.open_stack(data, "x")
    assert fault in caught.value.fault


def test_a_bomb_is_refused_before_it_is_unpacked_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = nifti(tmp_path / "x.nii", HEAD).read_bytes()
    bomb = gzip.compress(data + bytes(5_000_000))
    assert len(bomb) < 20_000
    monkeypatch.setattr(reader, "MOST_BYTES", 1_000_000)
    with pytest.raises(ImageError, match=r"^x: unpacks to more than 1 MB"):
        decode.decode(bomb, "x")
    monkeypatch.setattr(decode, "MOST_PIXELS", 100)
    with pytest.raises(ImageError, match="has slices of 12 x 16 x 9 voxels; the limit is 0 megapixels"):
        decode.decode(data, "x")
    with pytest.raises(ImageError, match=r"^x: cannot be unpacked"):
        decode.decode(gzip.compress(data)[:-20], "x")
    with pytest.raises(ImageError, match="is not in a supported image format"):
        decode.decode(gzip.compress(b"another archive" * 99), "x.nii.gz")


# --- Ingestion ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two volumes each."""
    rng = np.random.default_rng(0)
    for label in ("ill", "well"):
        for k in range(2):
            voxels = HEAD + rng.integers(0, 60, HEAD.shape).astype(np.int16) * (HEAD > 0)
            nifti(tmp_path / "set" / label / f"head{k}.nii.gz", voxels)
    return tmp_path / "set"


def test_the_folder_labels_the_slices_of_a_volume_as_one_group(folder: Path) -> None:
    cache = folder.parent / "cache"
    found = ingest(folder, cache=cache)
    assert ingest(folder, cache=cache) == found
    assert len(found.records) == 4 * 7
    assert [r.path for r in found.records[:2]] == ["ill/head0.nii.gz#z=1", "ill/head0.nii.gz#z=2"]
    assert len({r.patient for r in found.records}) == 4 and len({r.sha256 for r in found.records}) == 28
    assert all((r.width, r.height, r.mode) == (12, 16, "I;16") for r in found.records)
    faults = [f.fault for f in found.reported if f.path != "."]
    assert faults == ["holds 2 constant slice(s), which are left out"] * 4 and not found.left_out
    for record in found.records[:3]:
        assert decode.read_named(folder / record.path)[0] == record.sha256


def test_the_cache_distinguishes_axes_and_steps(folder: Path) -> None:
    def numbers(found: Ingested) -> list[str]:
        return [r.path.partition("#")[2] for r in found.records if "ill/head0" in r.path]

    cache = folder.parent / "cache"
    assert len(numbers(ingest(folder, cache=cache))) == 7
    assert numbers(ingest(folder, cache=cache, slices=(2, 3))) == ["z=3", "z=6"]
    assert numbers(ingest(folder, cache=cache, slices=(1, 5))) == ["y=05", "y=10"]
    assert numbers(ingest(folder, cache=cache, slices=(0, 4))) == ["x=04", "x=08"]


def test_a_manifest_may_list_a_volume_or_one_of_its_slices(folder: Path) -> None:
    lines = ["path,label,patient", "ill/head0.nii.gz,ill,p1", "well/head1.nii.gz#y=5,well,"]
    lines += ["well/head0.nii.gz#z=0,well,p3", "well/head0.nii.gz#z=99,well,p3"]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    found = ingest(folder, manifest="list.csv")
    chosen = [(r.path, r.patient) for r in found.records if r.label == "well"]
    assert chosen[0] == ("well/head0.nii.gz#z=0", "p3"), "a listed slice may be constant"
    assert chosen[1][0] == "well/head1.nii.gz#y=05" and chosen[1][1].startswith("file-")
    assert {r.patient for r in found.records if r.label == "ill"} == {"p1"}
    assert [f.path for f in found.left_out] == ["well/head0.nii.gz#z=99"]


def test_the_first_of_several_volumes_is_used_and_reported(folder: Path) -> None:
    nifti(folder / "ill" / "series.nii", np.stack([HEAD, HEAD[::-1], HEAD * 2], axis=3))
    found = ingest(folder)
    first = nifti(folder.parent / "first.nii", HEAD)
    shown = decode.read(folder / "ill" / "series.nii#z=4")
    assert np.array_equal(shown, decode.read(Path(f"{first}#z=4")))
    assert ("ill/series.nii", "holds 3 volumes; only the first is used") in [
        (f.path, f.fault) for f in found.reported
    ]


def test_constant_volumes_and_masks_of_volumes_are_not_images(tmp_path: Path) -> None:
    for label in ("ill", "well"):
        nifti(tmp_path / label / "x.nii.gz", HEAD + (label == "ill"))
        nifti(tmp_path / label / "x_mask.nii.gz", HEAD)
    nifti(tmp_path / "ill" / "air.nii", np.zeros((5, 5, 5), np.int16))
    found = ingest(tmp_path)
    assert not any("mask" in r.path or "air" in r.path for r in found.records)
    assert ("ill/air.nii", "holds only constant slices") in [(f.path, f.fault) for f in found.left_out]
    (tmp_path / "well" / "x.nii.gz").write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(IngestError, match="the class has no usable image"):
        ingest(tmp_path)
