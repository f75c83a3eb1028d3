"""A MedMNIST file (Yang et al., Scientific Data 10:41, 2023) -> class folders of PNGs.

Of a file, ``{train,val,test}_images`` are (N, S, S) or (N, S, S, 3) uint8 and ``_labels`` (N, 1) integers;
S is 28, in MedMNIST+ 64, 128 or 224 too. The arrays are read from the archive an image at a time: the
largest unpacks to 13 GB.
"""

from __future__ import annotations

import importlib
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from medfocus.images.decode import MOST_PIXELS
from medfocus.storage import atomic

SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver")
_ORGANS += ("lung-left", "lung-right", "pancreas", "spleen")
# The classes as the medmnist package 3.0.2 has them, so that their names do not hang on its being installed.
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        "adipose",
        "background",
        "debris",
        "lymphocytes",
        "mucus",
        "smooth muscle",
        "normal colon mucosa",
        "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma",
        "basal cell carcinoma",
        "benign keratosis-like lesions",
        "dermatofibroma",
        "melanoma",
        "melanocytic nevi",
        "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": (
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule",
        "Distal Convoluted Tubule",
        "Glomerular endothelial cells",
        "Interstitial endothelial cells",
        "Leukocytes",
        "Podocytes",
        "Proximal Tubule Segments",
        "Thick Ascending Limb",
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}
_MULTI_LABEL = ("chestmnist",)


@dataclass(frozen=True)
class _Array:
    """One array of a file, its header read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self) -> Iterator[np.ndarray]:
        """One after the other, of ``shape[1:]``."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{self.name}.npy") as stream:
            _header(stream)
            for place in range(self.shape[0]):
                try:
                    data = stream.read(size)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise _fault(self.file, f"{self.name} is damaged ({error})", "Get it again.") from error
                if len(data) < size:
                    raise _fault(self.file, f"{self.name} ends after {place} images", "Get it again.")
                yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])


def guess_name(file: Path) -> str | None:
    """The set that a file is of, by its name; None for a name that is not known."""
    name = file.stem.casefold().partition("_")[0]
    return name if name in CLASSES or name in _MULTI_LABEL or name.endswith("mnist3d") else None


def check_name(name: str) -> None:
    """Raises ValueError for a set that is not one of images with a class each."""
    if name.endswith("3d"):
        raise ValueError(f"{name}: holds volumes, and only images are read. Use one of {', '.join(CLASSES)}.")
    if name in _MULTI_LABEL:
        raise ValueError(
            f"{name}: an image in it has several labels at once, and here has one class. "
            f"Use one of {', '.join(CLASSES)}."
        )


def convert(
    file: Path, out: Path, progress: Callable[[int, int], object] | None = None
) -> dict[str, Counter[str]]:
    """Write ``out``/{train,val,test}/CLASS/NNNNN.png, the number being the place in the file.

    Args:
        file: An .npz of MedMNIST; by its name the classes are known.
        out: A folder that is not there; it appears when it is whole.
        progress: Called with the images that are written and with how many there are.

    Returns images by split and class.

    Raises:
        ValueError: It is no such file, or its arrays do not fit each other; nothing is written.
        FileExistsError: ``out`` is there.
        FileNotFoundError: ``file`` is not.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a MedMNIST .npz, or the name of a set.")
    name = guess_name(file)
    if name is not None:
        check_name(name)
    splits = _checked(file)
    labels = {split: _labels(of) for split, (_, of) in splits.items()}
    names = _class_names(file, name, labels)
    total, done = sum(map(len, labels.values())), 0
    counts: dict[str, Counter[str]] = {}
    with atomic.whole_folder(out) as folder:
        for split, (images, _) in splits.items():
            counts[split] = Counter(names[label] for label in labels[split])
            for label in names.values():
                (folder / split / label).mkdir(parents=True, exist_ok=True)
            for place, (pixels, label) in enumerate(zip(images.rows(), labels[split], strict=True)):
                Image.fromarray(pixels).save(folder / split / names[label] / f"{place:05d}.png")
                done += 1
                if progress is not None:
                    progress(done, total)
        for empty in [path for path in folder.glob("*/*") if not any(path.iterdir())]:
            empty.rmdir()  # a class that a split does not have
    return counts


def fetch(name: str, size: int) -> Path:
    """The file of a set, downloaded by the medmnist package into that one's own cache, its MD5 checked there.

    Raises ValueError where the package is not installed, the set is not known or cannot be fetched.
    """
    check_name(name)
    if name not in CLASSES:
        raise ValueError(f"{name}: no file and no set of MedMNIST; they are {', '.join(CLASSES)}.")
    if size not in SIZES:
        raise ValueError(f"{name}: --size is {size}; MedMNIST+ has {', '.join(map(str, SIZES))}.")
    file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    way = f"or download {file} from medmnist.com and give the file instead of the name"
    try:
        package: Any = importlib.import_module("medmnist")  # optional; it makes its cache's folder
    except ImportError as error:
        raise ValueError(
            f"{name}: to fetch it the package medmnist is needed. Install medfocusclip[medmnist], {way}."
        ) from error
    try:
        chosen = getattr(package, package.INFO[name]["python_class"])
        return Path(chosen(split="test", download=True, size=size).root) / file
    except (OSError, RuntimeError) as error:  # of the network, and what the package makes of it
        raise ValueError(
            f"{name}: cannot be fetched ({type(error).__name__}). Try again with a network, {way}."
        ) from error


def _checked(file: Path) -> dict[str, tuple[_Array, _Array]]:
    """Split -> its images and labels, of fitting shapes and types."""
    arrays = _arrays(file)
    found: dict[str, tuple[_Array, _Array]] = {}
    for split in SPLITS:
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            missing = f"{split}_images" if images is None else f"{split}_labels"
            raise _fault(file, f"has no {missing}", "Get it again.")
        _check_images(images)
        if labels.shape[1:] not in ((), (1,)):
            fault = (
                f"{labels.name} has {math.prod(labels.shape[1:])} labels per image, and here it has one class"
            )
            raise _fault(file, fault, "Use a set that is not multi-label.")
        if labels.dtype.kind not in "iu":
            raise _fault(file, f"{labels.name} holds {labels.dtype}, not integers", "Get it again.")
        if labels.shape[0] != images.shape[0]:
            fault = f"has {images.shape[0]} {images.name} and {labels.shape[0]} {labels.name}"
            raise _fault(file, fault, "Get it again.")
        found[split] = images, labels
    if "train" not in found:
        raise _fault(
            file, f"has no train_images (but {', '.join(arrays) or 'nothing'})", "Give one of MedMNIST."
        )
    return found


def _check_images(array: _Array) -> None:
    _, *size = array.shape
    flat = len(size) == 2 or (len(size) == 3 and size[2] == 3)
    if not flat and len(size) in (3, 4):
        shape = " x ".join(map(str, array.shape))
        raise _fault(
            array.file, f"{array.name} is {shape}: volumes, and only images are read", "Use a 2D set."
        )
    if not flat or 0 in size or math.prod(size[:2]) > MOST_PIXELS:
        fault = f"{array.name} has shape {array.shape}, not (N, S, S) or (N, S, S, 3)"
        raise _fault(array.file, fault, "Get it again.")
    if array.dtype != np.uint8:
        fault = f"{array.name} holds {array.dtype}, not uint8"
        raise _fault(array.file, fault, "Scale its values to 0 to 255 and save them as uint8.")


def _labels(array: _Array) -> list[int]:
    return [int(row.reshape(-1)[0]) for row in array.rows()]


def _class_names(file: Path, name: str | None, labels: dict[str, list[int]]) -> dict[int, str]:
    present = sorted({label for some in labels.values() for label in some})
    if name is None:
        return {label: f"class_{label}" for label in present}
    names = dict(enumerate(CLASSES[name]))
    if strange := [label for label in present if label not in names]:
        fault = f"has a label {strange[0]}, but {name} has the classes 0 to {len(names) - 1}"
        raise _fault(file, fault, "Rename the file, if it is another set.")
    return names


def _arrays(file: Path) -> dict[str, _Array]:
    """The arrays of an .npz by their names, from their headers alone."""
    found: dict[str, _Array] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, fortran, dtype = _header(stream)
                if dtype.hasobject:
                    raise _fault(file, f"{member} holds Python objects, which are not read", "Get it again.")
                if fortran and len(shape) > 1:
                    raise _fault(file, f"{member} is stored column by column", "Save it again in C order.")
                found[member.removesuffix(".npy")] = _Array(file, member.removesuffix(".npy"), shape, dtype)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise _fault(file, f"is no sound .npz ({error})", "Get it again.") from error
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type; the stream is then at the values."""
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(stream)
    except ValueError as error:
        raise ValueError(
            f"{getattr(stream, 'name', 'a member')}: is no array of numpy ({error}). Get it again."
        ) from error


def _fault(file: Path, fault: str, fix: str) -> ValueError:
    return ValueError(f"{file}: {fault}. {fix}")
