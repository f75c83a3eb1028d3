"""DICOM files are displayed as in a viewer, meet the limits, and do not reveal their patients."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from flows.cli.init.modality import OTHER, by_headers
from medfocus.datasets import pseudonyms
from medfocus.datasets.duplicates import find_duplicates, groups, twins
from medfocus.datasets.ingest import Ingested, ingest
from medfocus.datasets.pseudonyms import Salt
from medfocus.datasets.records import Record
from medfocus.datasets.splits import Splits, draw_splits
from medfocus.images import decode, gdcm_process, gdcm_worker, stack
from medfocus.images import dicom as reader
from medfocus.images.errors import ImageError
from medfocus.masks.quality import known_region
from tests.dicoms import baseline, dicom, jpeg, jpeg2000, shown

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 12 bits
TWELVE: dict[str, Any] = {"BitsStored": 12, "HighBit": 11}
NAME, ID = "DOE^JANE", "MRN-0815-4711"


def packaged(name: str) -> bytes:
    """Read a test file of pydicom."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"pydicom's wheel lacks {name}"
    return Path(path).read_bytes()


# --- Test files of pydicom ---------------------------------------------------------------------------------

READ = {  # frames, height, width, whether in colour
    "CT_small.dcm": (1, 128, 128, False),
    "MR_small.dcm": (1, 64, 64, False),
    "MR_small_bigendian.dcm": (1, 64, 64, False),
    "MR_small_expb.dcm": (1, 64, 64, False),
    "MR_small_implicit.dcm": (1, 64, 64, False),
    "MR_small_padded.dcm": (1, 64, 64, False),
    "MR_small_RLE.dcm": (1, 64, 64, False),
    "MR_small_jp2klossless.dcm": (1, 64, 64, False),
    "MR_small_jpeg_ls_lossless.dcm": (1, 64, 64, False),
    "693_J2KI.dcm": (1, 512, 512, False),
    "J2K_pixelrep_mismatch.dcm": (1, 512, 512, False),
    "JPEG2000.dcm": (1, 1024, 256, False),
    "JPEGLSNearLossless_08.dcm": (1, 45, 10, False),
    "JPEGLSNearLossless_16.dcm": (1, 50, 10, False),
    "image_dfl.dcm": (1, 512, 512, False),
    "examples_overlay.dcm": (1, 300, 484, False),
    "examples_palette.dcm": (1, 350, 800, True),
    "examples_rgb_color.dcm": (1, 240, 320, True),
    "examples_jpeg2k.dcm": (1, 480, 640, True),
    "examples_ybr_color.dcm": (30, 240, 320, True),
    "ExplVR_BigEnd.dcm": (1, 60, 80, True),
    "GDCMJ2K_TextGBR.dcm": (1, 400, 400, True),
    "SC_rgb_rle_2frame.dcm": (2, 100, 100, True),
    "SC_rgb_rle_16bit_2frame.dcm": (2, 100, 100, True),
    "SC_rgb_rle_32bit_2frame.dcm": (2, 100, 100, True),
    "SC_rgb_jls_lossy_line.dcm": (1, 100, 100, True),
    "SC_rgb_jpeg_gdcm.dcm": (1, 100, 100, True),
    "SC_rgb_jpeg_dcmtk.dcm": (1, 100, 100, True),
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": (1, 100, 100, True),
    "SC_ybr_full_422_uncompressed.dcm": (1, 100, 100, True),
    "SC_rgb_small_odd_big_endian.dcm": (1, 3, 3, True),
}
REFUSED = {
    "JPEG-lossy.dcm": "is stored as JPEG Extended (Process 2 and 4) with 12 bits, which cannot be decoded",
    "JPEG2000-embedded-sequence-delimiter.dcm": "pixels do not have the size in its header",
    "MR_truncated.dcm": "declares 8192 bytes of pixel data, but holds 8130",
    "badVR.dcm": "holds no image (RT Dose Storage)",
    "rtplan.dcm": "holds no image (RT Plan Storage)",
    "rtstruct.dcm": "holds no image (RT Structure Set Storage)",
    "rtdose.dcm": "holds no image (RT Dose Storage)",
    "liver_1frame.dcm": "holds no image (Segmentation Storage)",
    "test-SR.dcm": "holds no image (Comprehensive SR Storage)",
    "waveform_ecg.dcm": "holds no image (12-lead ECG Waveform Storage)",
    "DICOMDIR": "holds no image (Media Storage Directory Storage)",
}


@pytest.mark.parametrize("name", READ)
def test_every_transfer_syntax_in_pydicoms_test_files_is_read(name: str) -> None:
    data = packaged(name)
    stack = decode.open_stack(data, name)
    assert stack is not None
    count, height, width, colour = READ[name]
    assert len(stack.names()) == count and (stack.mode == "RGB") == colour
    for frame in stack.names()[:2]:
        pixels = stack.pixels(frame)
        assert pixels.shape == ((height, width, 3) if colour else (height, width))
        assert int(pixels.max()) - int(pixels.min()) > 100, "something is to be seen"
    if count == 1:
        assert decode.decode(data, name).shape == (height, width, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_a_decodable_image_are_named_with_their_fix(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode.decode(packaged(name), name)
    assert REFUSED[name] in caught.value.fault
    assert caught.value.fix.endswith("remove it.")


def test_the_encoding_does_not_change_the_image() -> None:
    whole = decode.decode(packaged("MR_small.dcm"), "x")
    for form in ("bigendian", "implicit", "expb", "padded", "RLE", "jp2klossless", "jpeg_ls_lossless"):
        assert np.array_equal(decode.decode(packaged(f"MR_small_{form}.dcm"), form), whole), form
    bars = decode.decode(packaged("SC_rgb_rle.dcm"), "x")
    for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_jpeg_gdcm.dcm"):
        assert np.abs(decode.decode(packaged(name), name).astype(int) - bars).max() <= 1, name
    for name in ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_jpeg_dcmtk.dcm"):
        close = np.abs(decode.decode(packaged(name), name).astype(int) - bars) <= 6
        assert close.mean() > 0.95, name  # chroma subsampling blurs edges


# --- Values ------------------------------------------------------------------------------------------------


def test_without_a_window_the_minimum_is_black_and_the_maximum_white() -> None:
    found = shown(dicom(RAMP + 15, **TWELVE))
    assert np.array_equal(found, np.arange(256).reshape(16, 16))
    eight = np.array([[10, 200], [30, 90]], np.uint8)
    assert np.array_equal(shown(dicom(eight)), eight), "8 bits stay as those of a PNG do"


def test_the_first_window_is_applied_after_the_rescale() -> None:
    data = dicom(
        RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[40, 500], WindowWidth=[400, 9], **TWELVE
    )
    houndsfield = RAMP * 2.0 - 1000
    expected = np.clip(((houndsfield - 39.5) / 399 + 0.5) * 255, 0, 255)  # PS3.3 C.11.2.1.2.1
    assert np.abs(shown(data) - expected).max() <= 0.5


def test_a_signed_image_of_twelve_bits_in_sixteen() -> None:
    stored = RAMP.astype(np.int16) - 2048
    assert np.array_equal(shown(dicom(stored, **TWELVE)), np.arange(256).reshape(16, 16))
    windowed = shown(dicom(stored, WindowCenter=0, WindowWidth=100, **TWELVE))
    assert (windowed[stored < -50] == 0).all() and (windowed[stored > 50] == 255).all()


def test_sigmoid_exact_and_invalid_windows() -> None:
    sigmoid = shown(dicom(RAMP, WindowCenter=2048, WindowWidth=800, VOILUTFunction="SIGMOID", **TWELVE))
    assert np.abs(sigmoid - 255 / (1 + np.exp(-4 * (RAMP - 2048.0) / 800))).max() <= 0.6
    exact = shown(dicom(RAMP, WindowCenter=1000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT", **TWELVE))
    assert np.abs(exact - np.clip((RAMP - 500.0) / 1000 * 255, 0, 255)).max() <= 0.6
    plain = shown(dicom(RAMP, **TWELVE))
    assert np.array_equal(shown(dicom(RAMP, WindowCenter=40, WindowWidth=0, **TWELVE)), plain)


def lut(values: list[int], first: int, bits: int) -> Dataset:
    """A lookup table that begins with the value ``first``."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def test_a_voi_lut_has_precedence_over_a_window() -> None:
    table = [4095 - i for i in range(4096)]
    data = dicom(RAMP, VOILUTSequence=[lut(table, 0, 12)], WindowCenter=1, WindowWidth=1, **TWELVE)
    assert np.abs(shown(data) - (4095.0 - RAMP) / 4095 * 255).max() <= 0.5
    short = [i // 16 for i in range(4096)]  # 8 bits, of which pydicom alone would see 256 entries
    assert np.array_equal(shown(dicom(RAMP, VOILUTSequence=[lut(short, 0, 8)], **TWELVE)), RAMP // 16)


def test_a_modality_lut_is_applied() -> None:
    data = dicom(RAMP, ModalityLUTSequence=[lut([4095 - i for i in range(4096)], 0, 16)], **TWELVE)
    assert np.array_equal(shown(data), np.arange(256)[::-1].reshape(16, 16))


def test_monochrome1_is_inverted() -> None:
    inverted = shown(dicom(RAMP, PhotometricInterpretation="MONOCHROME1", **TWELVE))
    assert np.array_equal(inverted, 255 - shown(dicom(RAMP, **TWELVE)))


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_influence_the_window(interpretation: str) -> None:
    stored = RAMP.astype(np.int16)
    stored[:4] = -2000
    found = shown(dicom(stored, PixelPaddingValue=-2000, PhotometricInterpretation=interpretation))
    plain = shown(dicom(stored[4:], PhotometricInterpretation=interpretation))
    assert not found[:4].any() and np.array_equal(found[4:], plain)


def test_a_palette_gives_colours() -> None:
    tables = {"Red": [0, 255, 0, 9], "Green": [0, 0, 128, 9], "Blue": [64, 0, 0, 9]}
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in tables.items():
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        palette[f"{colour}PaletteColorLookupTableData"] = bytes(values)
    image = decode.decode(dicom(np.array([[0, 1], [2, 2]], np.uint8), **palette), "x")
    assert image[0].tolist() == [[0, 0, 64], [255, 0, 0]] and image[1, 0].tolist() == [0, 128, 0]


def test_colours_by_plane_and_by_pixel_are_the_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    planes = dicom(image, PlanarConfiguration=1, PixelData=image.transpose(2, 0, 1).tobytes())
    assert np.array_equal(decode.decode(dicom(image), "x"), image)
    assert np.array_equal(decode.decode(planes, "x"), image)


def test_sixteen_and_thirty_two_bits() -> None:
    deep = (RAMP.astype(np.uint32) << 16) + 5
    assert np.array_equal(shown(dicom(deep)), np.arange(256).reshape(16, 16))
    assert np.array_equal(shown(dicom((RAMP << 4).astype(np.uint16))), np.arange(256).reshape(16, 16))


def test_rle_and_jpeg_2000_keep_every_value() -> None:
    plain = shown(dicom(RAMP, **TWELVE))
    assert np.array_equal(shown(jpeg2000(RAMP)), plain)
    data = pydicom.dcmread(io.BytesIO(dicom(RAMP, **TWELVE)))
    data.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    file = io.BytesIO()
    data.save_as(file)
    assert np.array_equal(shown(file.getvalue()), plain)


def test_an_enhanced_file_has_a_window_and_a_rescale_per_frame() -> None:
    def functional(**tags: float) -> Dataset:
        item = Dataset()
        for name, value in tags.items():
            setattr(item, name, value)
        return item

    shared, frames_own = Dataset(), []
    shared.PixelValueTransformationSequence = [functional(RescaleSlope=2, RescaleIntercept=-1000)]
    for centre in (0, 3000):
        own = Dataset()
        own.FrameVOILUTSequence = [functional(WindowCenter=centre, WindowWidth=101)]
        frames_own.append(own)
    data = dicom(
        np.stack([RAMP, RAMP]),
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames_own,
        **TWELVE,
    )
    for frame, centre in (("0", 0), ("1", 3000)):
        expected = np.clip(((RAMP * 2.0 - 1000 - (centre - 0.5)) / 100 + 0.5) * 255, 0, 255)
        assert np.abs(shown(data, frame) - expected).max() <= 0.5


# --- False headers and broken bytes ------------------------------------------------------------------------


def test_dicom_is_recognised_by_its_bytes_with_and_without_a_preamble() -> None:
    data = dicom(RAMP, **TWELVE)
    file = DicomBytesIO()
    file.is_little_endian, file.is_implicit_VR = True, True
    write_dataset(file, pydicom.dcmread(io.BytesIO(data)))
    for bare in (data[132:], file.getvalue()):
        assert np.array_equal(decode.decode(bare, "x"), decode.decode(data, "x"))
    for name in ("text.txt", "x.dcm"):
        with pytest.raises(ImageError, match="is not in a supported image format"):
            decode.decode(b"no image at all, whatever its name says" * 9, name)


def test_pydicom_is_not_imported_for_other_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(jpeg(np.zeros((4, 4), np.uint8), "PNG"))
    code = "import sys; from pathlib import Path; from medfocus.images import decode;"
    code += "decode.read(Path(sys.argv[1]));"
    code += "assert not {'pydicom', 'gdcm', 'nibabel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], check=True)


@pytest.mark.parametrize(
    ("tags", "fault"),
    [
        (
            {"Rows": 8001, "Columns": 8000},
            "has 8000 x 8001 pixels; the limit is 64 megapixels",
        ),
        ({"NumberOfFrames": 2_000_000_000}, "declares 1024000000000 bytes"),
        ({"Rows": 17}, "declares 544 bytes of pixel data, but holds 512"),
        ({"Rows": 0}, "has 16 x 0 pixels"),
        ({"NumberOfFrames": -1}, "declares "),
    ],
)
def test_a_header_that_declares_too_much_is_refused_before_decoding(
    tags: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader.Dicom, "_stored", lambda *_: pytest.fail("a pixel was decoded"))
    with pytest.raises(ImageError) as caught:
        decode.decode(dicom(RAMP, **tags), "x.dcm")
    assert fault in caught.value.fault


@pytest.mark.parametrize("form", ["JPEG", "JPEG2000"])
def test_a_compressed_frame_of_another_size_than_its_header_is_refused(form: str) -> None:
    small, large = np.zeros((16, 16), np.uint8), np.zeros((512, 512), np.uint8)
    make = baseline if form == "JPEG" else jpeg2000
    assert decode.decode(make(small), "x").shape == (16, 16, 3)
    for rows in (16, 600):
        with pytest.raises(ImageError, match="do not have the size in its header"):
            decode.decode(make(large, Rows=rows, Columns=rows), "x")


def test_a_frame_that_crashes_gdcm_is_refused_and_the_next_one_is_read() -> None:
    """GDCM 3.2 aborts on this frame; in the process of a run it would end the run."""
    data = packaged("MR_small_jpeg_ls_lossless.dcm")
    bits = data.index(b"\xff\xd8\xff\xf7") + 6
    with pytest.raises(ImageError, match="GDCM crashed on its compressed pixels"):
        decode.decode(data[:bits] + b"\x80" + data[bits + 1 :], "x")
    assert decode.decode(data, "x").shape == (64, 64, 3)


def test_a_frame_that_gdcm_does_not_finish_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text("import sys, time\nsys.stdin.buffer.readline()\ntime.sleep(600)\n")
    monkeypatch.setattr(gdcm_worker, "__file__", str(endless))
    monkeypatch.setattr(gdcm_process, "_TIMEOUT", 0.5)
    with pytest.raises(gdcm_process.GdcmCrash, match=r"took more than 0\.5 s"):
        gdcm_process.Gdcm().decode(b"frame")


def test_broken_headers_are_refused_or_read_and_nothing_else() -> None:
    rng, data = np.random.default_rng(0), dicom(RAMP, **TWELVE)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for place in rng.integers(132, len(data) - RAMP.nbytes, 3):
            broken[place] = rng.integers(256)
        try:
            decode.decode(bytes(broken), "x")
        except ImageError:
            refused += 1
    assert 30 < refused < 300


def test_missing_compressed_frames_are_refused() -> None:
    with pytest.raises(ImageError, match="declares 500 fragments of pixel data"):
        decode.decode(baseline(np.zeros((16, 16), np.uint8), NumberOfFrames=500), "x")


def test_rle_frames_that_unpack_to_far_more_than_the_image_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + b"\x81\0" * 50_000
    data = dicom(np.zeros((16, 16), np.uint8), frames=[runs], syntax=RLELossless)
    monkeypatch.setattr(reader, "_MOST_RUNS", 10_000)
    with pytest.raises(ImageError, match="do not have the size in its header"):
        decode.decode(data, "x")


def test_a_deflated_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.decode(packaged("image_dfl.dcm"), "x").shape == (512, 512, 3)
    data = dicom(np.zeros((2000, 2000), np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    assert len(data) < 20_000
    monkeypatch.setattr(decode, "MOST_BYTES", 3_000_000)
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("it was unpacked whole"))
    with pytest.raises(ImageError, match=r"^x: unpacks to more than 3 MB, the limit\."):
        decode.decode(data, "x")


def test_truncated_files_are_refused_or_read_and_nothing_else() -> None:
    for data in (packaged("MR_small_RLE.dcm"), packaged("MR_small_jp2klossless.dcm"), dicom(RAMP, **TWELVE)):
        for end in range(140, len(data), len(data) // 12):
            with pytest.raises(ImageError):
                decode.decode(data[:end], "x")


# --- Files of several images -------------------------------------------------------------------------------


def stack_of(path: Path, count: int = 12, **tags: Any) -> Path:
    """Write a file of frames with different brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.stack([np.full((16, 16), 20 * k, np.uint8) for k in range(count)])
    stored[:, 4:8, 4:8] += 9
    path.write_bytes(dicom(stored, NumberOfFrames=count, **tags))
    return path


def test_a_frame_is_named_after_a_number_sign(tmp_path: Path) -> None:
    file = stack_of(tmp_path / "x.dcm")
    assert decode.read(Path(f"{file}#7"))[0, 0, 0] == decode.read(Path(f"{file}#07"))[0, 0, 0] == 140
    assert [path.name for path in decode.frames_of(file)] == [f"x.dcm#{k:02}" for k in range(12)]
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    sha, _ = decode.read_named(Path(f"{file}#07"))
    assert sha == stack.digest(whole, "07") == hashlib.sha256(f"{whole}#07".encode()).hexdigest()
    for wrong in ("12", "x", "-1", "z=1"):
        with pytest.raises(ImageError, match=f"has no frame '{wrong}'; its frames are 0 to 11"):
            decode.read(Path(f"{file}#{wrong}"))
    with pytest.raises(ImageError, match=r"holds several images\. Name one of them after a #"):
        decode.read(file)
    with pytest.raises(ImageError, match=r"^upload: holds several images"):
        decode.decode(file.read_bytes(), "upload")


def test_an_existing_file_may_have_a_number_sign_in_its_name(tmp_path: Path) -> None:
    stack_of(tmp_path / "x.dcm")
    (tmp_path / "x.dcm#07").write_bytes(jpeg(np.full((5, 6), 77, np.uint8), "PNG"))
    assert decode.read(tmp_path / "x.dcm#07").shape == (5, 6, 3)
    with pytest.raises(FileNotFoundError):
        decode.read(tmp_path / "y.dcm#07")


def test_a_file_is_opened_once_for_all_its_frames_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, opened = stack_of(tmp_path / "x.dcm"), []
    monkeypatch.setattr(decode, "open_stack", lambda *a, o=decode.open_stack: opened.append(1) or o(*a))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(decode.read, decode.frames_of(file) * 3))
    assert [image[0, 0, 0] for image in read[:3]] == [0, 20, 40] and len(opened) == 1
    stack_of(file, 3)
    assert decode.frames_of(file) == [Path(f"{file}#{k}") for k in range(3)] and len(opened) == 2


def test_known_regions_of_frames_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "masks" / "a").mkdir(parents=True)
    for name in ("x_07.png", "x_08_mask.png"):
        (tmp_path / "masks" / "a" / name).write_bytes(jpeg(np.full((4, 4), 255, np.uint8), "PNG"))
    assert known_region(tmp_path, "a/x.dcm#07", 4, 4) is not None
    assert known_region(tmp_path, "a/x.dcm#08", 4, 4) is not None
    assert known_region(tmp_path, "a/x.dcm#09", 4, 4) is None


# --- Ingestion ---------------------------------------------------------------------------------------------


def radiograph(seed: int, patient: str = "", **tags: Any) -> bytes:
    """A radiograph of noise that depends on the seed."""
    stored = np.random.default_rng(seed).integers(0, 4096, (24, 24)).astype(np.uint16).repeat(2, 0)
    window = {"WindowCenter": 2048, "WindowWidth": 4096, **TWELVE}
    return dicom(stored, PatientID=patient, PatientName=NAME, **{**window, **tags})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of radiographs, two per patient, with file names of scanners."""
    for label in ("ill", "well"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for k in range(10):
            data = radiograph(k + 100 * (label == "ill"), f"{ID}-{label}-{k // 2}", Modality="DX")
            (tmp_path / "set" / label / (f"IM{k:04}" if k % 2 else f"1.2.840.{k}")).write_bytes(data)
    return tmp_path / "set"


def read(root: Path, **options: Any) -> Ingested:
    return ingest(root, salt_file=root.parent / pseudonyms.FILE, **options)


def drawn(records: list[Record], folder: Path) -> Splits:
    pairs = find_duplicates(records, folder)
    same, near = groups(records, twins(pairs)), groups(records, pairs)
    return draw_splits(records, near, same, test_fraction=0.3, fractions=[0.5], shots=[], seeds=[0])


def test_a_folder_of_dicom_files_is_read_and_no_patient_is_in_both_splits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(folder)
    assert not found.left_out and not found.reported and len(found.records) == 20
    assert all(record.mode == "I;16" and len(record.patient) == 16 for record in found.records)
    assert len({record.patient for record in found.records}) == 10
    splits = drawn(found.records, folder)
    patient = {record.path: record.patient for record in found.records}
    test, train = ({patient[path] for path in part} for part in (splits.test, splits.train))
    assert test and train and not test & train
    monkeypatch.setenv(pseudonyms.VARIABLE, "a team's own secret")
    other = read(folder).records
    assert not {record.patient for record in other} & set(patient.values())
    assert drawn(other, folder) == splits, "draws depend on paths and patients, not on pseudonyms"


def test_patients_of_pattern_or_manifest_have_precedence_over_headers(folder: Path) -> None:
    found = read(folder, patient_pattern=r"IM000(\d)")
    assert {r.patient for r in found.records if "IM" in r.path} == {"1", "3", "5", "7", "9"}
    assert all(len(r.patient) == 16 for r in found.records if "IM" not in r.path)


def test_the_salt_is_created_once_only_for_its_owner_and_determines_every_pseudonym(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    salt, cache = folder.parent / pseudonyms.FILE, folder.parent / "cache"
    first = read(folder, cache=cache).records
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600 and len(salt.read_text().strip()) == 64
    assert read(folder, cache=cache).records == first == read(folder).records
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(pseudonyms.FILE)] == [
        salt.name
    ]
    monkeypatch.setenv(pseudonyms.VARIABLE, "a team's own secret")
    shared = read(folder, cache=cache).records  # the cache does not return pseudonyms of another salt
    assert not {record.patient for record in shared} & {record.patient for record in first}
    salt.unlink()
    assert read(folder).records == shared and not salt.exists()
    monkeypatch.setenv(pseudonyms.VARIABLE, "short")
    with pytest.raises(ValueError, match="the salt has 5 characters, but needs 16"):
        read(folder)


def test_threads_that_create_the_salt_together_share_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: Salt(tmp_path / "salt").pseudonym(ID), range(40)))
    assert len(made) == 1 and os.listdir(tmp_path) == ["salt"]


def test_no_error_cache_or_manifest_contains_a_patient_id(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even where pydicom would warn about a value, or in tags that define the display."""
    cache = folder.parent / "cache"
    (folder / "ill" / "long").write_bytes(radiograph(50, ID + "x" * 80))
    (folder / "ill" / "cut").write_bytes(radiograph(51, ID)[:-50])
    (folder / "ill" / "odd").write_bytes(radiograph(52, ID, InstitutionName=ID, ImageComments=ID * 9))
    bad = radiograph(53, ID).replace(b"MONOCHROME2 ", b"MONOCHROMEX ")
    (folder / "ill" / "bad").write_bytes(bad)
    found = read(folder, cache=cache)
    assert [fault.path for fault in found.left_out] == ["ill/bad", "ill/cut"]
    message = repr(found) + caplog.text + "".join(capfd.readouterr())
    kept = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    for planted in (ID, NAME):
        assert planted not in message and planted.encode() not in kept
    assert found.records[0].patient.encode() in kept


def test_each_reported_fault_is_listed_once(folder: Path) -> None:
    for k in range(3):
        (folder / "ill" / f"plain{k}.dcm").write_bytes(
            radiograph(60 + k, ID, WindowCenter=None, WindowWidth=None)
        )
    (folder / "ill" / "burnt.dcm").write_bytes(radiograph(70, ID, BurnedInAnnotation="YES"))
    (folder / "well" / "report.dcm").write_bytes(packaged("test-SR.dcm"))
    found = read(folder)
    assert [(fault.path, fault.fault) for fault in found.reported] == [
        ("ill/burnt.dcm", "has text in its pixels, according to its header; the text may name the patient"),
        (".", "3 DICOM images have no window and are displayed from minimum to maximum"),
    ]
    [left] = found.left_out
    assert (left.path, left.fault) == ("well/report.dcm", "holds no image (Comprehensive SR Storage)")


def test_each_frame_becomes_a_record_of_the_same_patient(folder: Path, tmp_path: Path) -> None:
    stack_of(folder / "well" / "cine.dcm")
    cache = tmp_path / "cache"
    found = read(folder, cache=cache)
    assert read(folder, cache=cache) == found
    own = [record for record in found.records if "cine" in record.path]
    assert [record.path for record in own] == [f"well/cine.dcm#{k:02}" for k in range(12)]
    assert len({record.sha256 for record in own}) == 12 and len({record.patient for record in own}) == 1
    for record in own:
        assert decode.read_named(folder / record.path)[0] == record.sha256
    [told_once] = found.reported
    assert told_once.fault == "1 files of several images have no patient; each counts as one patient"


def test_a_manifest_may_list_frames_and_files_of_frames(folder: Path) -> None:
    stack_of(folder / "a.dcm", 3)
    stack_of(folder / "b.dcm", 5)
    (folder / "list.csv").write_text(
        "path,label,patient\na.dcm,ill,p1\nb.dcm#3,well,p2\nb.dcm#04,ill,\nb.dcm#9,ill,\nc.dcm#1,ill,\n"
        "../out.dcm#1,ill,\na.dcm#1,well,p1\n"
    )
    found = read(folder, manifest="list.csv")
    assert [(r.path, r.label, r.patient[:5]) for r in found.records] == [
        ("a.dcm#0", "ill", "p1"),
        ("a.dcm#2", "ill", "p1"),
        ("b.dcm#3", "well", "p2"),
        ("b.dcm#4", "ill", "file-"),
    ]
    faults = {fault.path: fault.fault for fault in found.left_out}
    assert faults["b.dcm#9"] == "has no frame '9'; its frames are 0 to 4"
    assert faults["a.dcm#1"].startswith("is listed by itself and with its file")
    assert faults["list.csv, line 6: c.dcm#1"].startswith("no such file inside")
    assert faults["list.csv, line 7: ../out.dcm#1"].startswith("leads out of")


def test_a_link_out_of_the_root_is_not_followed_for_a_frame(folder: Path) -> None:
    stack_of(folder.parent / "outside.dcm")
    (folder / "link.dcm").symlink_to(folder.parent / "outside.dcm")
    (folder / "list.csv").write_text(
        "path,label\nill/IM0001,ill\nwell/IM0001,well\nlink.dcm#1,ill\n../outside.dcm#1,ill\n"
    )
    found = read(folder, manifest="list.csv")
    assert len(found.records) == 2
    assert [fault.fault for fault in found.left_out] == [f"leads out of {folder}"] * 2


# --- Modality from tags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "modality"),
    [
        ([("DX", "CHEST")] * 3, "chest_xray"),
        ([("CR", "CHEST PA")], "chest_xray"),
        ([("CT", "")], "chest_ct"),
        ([("CT", "THORAX")], "chest_ct"),
        ([("CT", "HEAD")], OTHER),
        ([("MR", "BRAIN")], "brain_mri"),
        ([("US", "BREAST")], "breast_ultrasound"),
        ([("MG", "BREAST")], OTHER),
        ([("US", "")], None),
        ([("", "")], None),
        ([("DX", "CHEST"), ("CT", "CHEST")], None),
    ],
)
def test_the_tags_give_the_modality_if_they_agree(
    headers: list[tuple[str, str]], modality: str | None
) -> None:
    found = by_headers(headers)
    assert (found and found.modality) == modality
