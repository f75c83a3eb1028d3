"""Every image decodes to RGB, and images and masks share their geometry."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from medfocus.images import contact_sheet, decode, geometry
from medfocus.images.errors import ImageError

RED = (255, 0, 0)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "modes"),
    [
        ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "I", "F", "LAB")),
        ("JPEG", ("L", "RGB", "CMYK")),
        ("BMP", ("1", "L", "P", "RGB")),
        ("WEBP", ("RGB", "RGBA")),
    ],
)
def test_every_mode_of_every_format_decodes_to_rgb(form: str, modes: tuple[str, ...]) -> None:
    for mode in modes:
        image = decode.decode(encoded(Image.new(mode, (5, 4)), form), mode)
        assert image.shape == (4, 5, 3), mode
        assert image.dtype == np.uint8, mode
        assert image.flags.writeable, mode


def test_sixteen_bit_grey_is_windowed_by_its_own_range() -> None:
    values = np.array([[1000, 2000, 3000]], dtype=np.uint16)
    image = decode.decode(encoded(Image.fromarray(values)), "x")
    np.testing.assert_array_equal(image[0, :, 0], [0, 128, 255])


def test_constant_sixteen_bit_grey_is_black() -> None:
    values = np.full((3, 3), 40_000, dtype=np.uint16)
    assert not decode.decode(encoded(Image.fromarray(values)), "x").any()


def test_alpha_is_composited_over_black() -> None:
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8)
    image = decode.decode(encoded(Image.fromarray(rgba)), "x")
    np.testing.assert_array_equal(image[0], [[200, 100, 50], [0, 0, 0]])


def test_transparent_palette_entry_is_black() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    image = decode.decode(encoded(palette, transparency=0), "x")
    np.testing.assert_array_equal(image[0], [[0, 0, 0], RED])


def test_exif_orientation_is_applied() -> None:
    upright = np.zeros((4, 6, 3), dtype=np.uint8)
    upright[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    image = decode.decode(encoded(Image.fromarray(upright), exif=exif), "x")
    assert image.shape == (6, 4, 3)
    assert (image[:, -1] == 255).all()


def test_empty_file_is_named_with_its_fix() -> None:
    with pytest.raises(
        ValueError, match=r"^a/b\.png: the file is empty \(0 bytes\)\. Copy it again"
    ) as caught:
        decode.decode(b"", "a/b.png")
    assert isinstance(caught.value, ImageError)
    assert caught.value.name == "a/b.png"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_truncated_image_is_named_with_its_fix(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    with pytest.raises(ValueError, match=r"^x\.img: .+\. Export it again as PNG, or remove it\.$"):
        decode.decode(data[: len(data) // 2], "x.img")


def test_text_is_not_an_image() -> None:
    known = "PNG, JPEG, TIFF, BMP, WEBP, DICOM, NIFTI"
    fault = rf"^x: is not in a supported image format \({known}\)\. Export it again"
    with pytest.raises(ValueError, match=fault):
        decode.decode(b"no image at all", "x")


@pytest.mark.parametrize("form", ["GIF", "EPS", "PPM", "ICNS", "PCX"])
def test_other_decoders_of_pillow_are_not_used(form: str) -> None:
    with pytest.raises(ValueError, match=r"^x: is not in a supported image format"):
        decode.decode(encoded(Image.new("RGB", (32, 32)), form), "x")


def promising(width: int, height: int) -> bytes:
    """A PNG with a header that declares these sides, and no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "side", [8001, 10_000, 65_000]
)  # Pillow itself warns about the second and refuses the third
@pytest.mark.parametrize("warned", [True, False])
def test_an_image_above_64_megapixels_is_refused_by_its_header(side: int, warned: bool) -> None:
    data = promising(side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if warned else "ignore")
        with pytest.raises(ImageError) as caught:
            decode.decode(data, "x.png")
    text = str(caught.value)
    assert text.startswith("x.png: has ") and "the limit is 64 megapixels" in text
    assert text.endswith("Scale it down or cut it into tiles, or remove it.")


def test_an_image_of_64_megapixels_passes_without_a_warning() -> None:
    assert decode.read_header(promising(8000, 8000), "x").size == (8000, 8000)
    assert Image.MAX_IMAGE_PIXELS is not None and decode.MOST_PIXELS <= Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"^x: cannot be decoded \("):  # the file ends after the header
        decode.decode(promising(8000, 8000), "x")


_PEAK = """
import sys
from pathlib import Path
from medfocus.images import decode
assert decode.read(Path(sys.argv[1])).shape == (8000, 8000, 3)
# Not ru_maxrss, because it begins with the size of the parent process.
print(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_decoding_the_largest_image_takes_less_than_800_mib(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 8000), RED).save(tmp_path / "x.png", compress_level=1)
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "x.png")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 200 < int(process.stdout) / 1024 < 800


def test_a_text_that_unpacks_to_more_than_its_image_is_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    data = encoded(Image.new("L", (4, 4)), pnginfo=text)
    assert len(data) < 10_000
    with pytest.raises(ValueError, match=r"^x: cannot be decoded \(.*too large"):
        decode.decode(data, "x")


def test_a_file_is_read_up_to_the_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.MOST_BYTES == 256_000_000
    monkeypatch.setattr(decode, "MOST_BYTES", 3_000_000)
    (tmp_path / "x.png").write_bytes(bytes(3_000_001))
    fault = r"x\.png: the file is larger than 3 MB, the limit\. Export it smaller, .* remove it\.$"
    with pytest.raises(ImageError, match=fault):
        decode.read(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"^upload: the file is larger than 3 MB"):
        decode.decode(bytes(3_000_001), "upload")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would block forever
    with pytest.raises(ImageError, match=r"pipe\.png: is not a regular file\. Replace it"):
        decode.read(tmp_path / "pipe.png")


def test_infinite_values_are_refused() -> None:
    values = np.array([[0, np.inf]], dtype=np.float32)
    with pytest.raises(ValueError, match=r"^x: holds values that are not finite\. Replace them"):
        decode.decode(encoded(Image.fromarray(values), "TIFF"), "x")


def test_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", (2, 3), RED)))
    assert (decode.read(tmp_path / "x.png") == RED).all()
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.png: the file is empty"):
        decode.read(tmp_path / "x.png")


def test_grey_uses_the_luma_weights() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    luma = geometry.grey(colours)
    assert luma.dtype == np.float32
    assert luma.max() <= 1
    np.testing.assert_allclose(luma[0], [0.299, 0.587, 0.114, 1], atol=1e-6)


def test_letterbox_leaves_a_square_of_its_size_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(geometry.Frame(16, padding=RED).image(image), image)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 48))
def test_image_and_mask_have_the_same_placement(height: int, width: int, size: int) -> None:
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    frame = geometry.Frame(size, padding=(7, 8, 9))
    box = frame.image(white)
    mask = frame.mask(np.ones((height, width), dtype=bool))
    assert box.shape == (size, size, 3)
    assert mask.shape == (size, size)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask == 1, (box == 255).all(2))
    np.testing.assert_array_equal(mask == 0, (box == (7, 8, 9)).all(2))
    inside = mask.any(0).sum(), mask.any(1).sum()
    assert max(inside) == size
    first, last = np.flatnonzero(mask.any(1))[[0, -1]]
    assert abs(first - (size - 1 - last)) <= 1, "centred"


def test_montage_holds_every_tile_and_its_caption() -> None:
    tiles = [np.full((10, 20, 3), value, dtype=np.uint8) for value in (50, 100, 150)]
    plain = contact_sheet.montage(tiles, 2)
    sheet = contact_sheet.montage(tiles, 2, ["one", "a caption much too long", "three"])
    for value in (50, 100, 150):
        assert (plain == value).all(2).sum() == 200
        assert (sheet == value).all(2).sum() >= 200
    assert sheet.shape[0] > plain.shape[0]
    assert sheet.shape[1] == plain.shape[1]


def test_montage_refuses_a_wrong_number_of_captions() -> None:
    tile = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="2 captions for 1 tiles; give one per tile or None"):
        contact_sheet.montage([tile], 1, ["a", "b"])
    with pytest.raises(ValueError, match="0 tiles in 3 columns"):
        contact_sheet.montage([], 3)


def test_real_images_decode(shared_data: Path) -> None:
    for folder in sorted(shared_data.iterdir()):
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
        for path in files[:: max(1, len(files) // 5)]:
            image = decode.read(path)
            assert image.ndim == 3, path
            assert image.std() > 0 or "masks" in path.parts, path
