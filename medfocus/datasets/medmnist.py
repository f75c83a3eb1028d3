"""Convert a MedMNIST file (Yang et al., Scientific Data 10:41, 2023) to class folders of PNG images.

In a file, ``{train,val,test}_images`` are (N, S, S) or (N, S, S, 3) uint8, and ``{train,val,test}_labels``
are (N, 1) integers. S is 28; in MedMNIST+ it is 64, 128 or 224. The images are read from the archive one at a
time, because the largest file unpacks to 13 GB.
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

from medfocus.images.decode import MOST_PIXELS
from medfocus.images.png import encode_png
from medfocus.storage import atomic

SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver")
_ORGANS += ("lung-left", "lung-right", "pancreas", "spleen")
# Class names as in the package medmnist 3.0.2, copied because the package is optional.
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
    """An array of a file with a known header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the rows, each of ``shape[1:]``."""
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{self.name}.npy") as stream:
            _header(stream)
            for place in range(self.shape[0]):
                try:
                    data = stream.read(size)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise _fault(
                        self.file, f"{self.name} is damaged ({error})", "Download it again."
                    ) from error
                if len(data) < size:
                    raise _fault(self.file, f"{self.name} ends after {place} images", "Download it again.")
                yield np.frombuffer(data, self.dtype).reshape(self.shape[1:])


def guess_name(file: Path) -> str | None:
    """Return the name of the data set according to the name of its file; None for an unknown name."""
    name = file.stem.casefold().partition("_")[0]
    return name if name in CLASSES or name in _MULTI_LABEL or name.endswith("mnist3d") else None


def check_name(name: str) -> None:
    """Raise ValueError if a data set does not consist of images with one class each."""
    if name.endswith("3d"):
        raise ValueError(
            f"{name}: holds volumes, but only images are supported. Use one of {', '.join(CLASSES)}."
        )
    if name in _MULTI_LABEL:
        raise ValueError(
            f"{name}: its images have several labels, but only one class per image is supported. "
            f"Use one of {', '.join(CLASSES)}."
        )


def convert(
    file: Path, out: Path, progress: Callable[[int, int], object] | None = None
) -> dict[str, Counter[str]]:
    """Write ``out``/{train,val,test}/CLASS/NNNNN.png, numbered by the index in the file.

    Args:
        file: An .npz file of MedMNIST; its name determines the class names.
        out: A new folder, which appears when it is complete.
        progress: Called with the number of written images and the number of all images.

    Returns the number of images by split and class.

    Raises:
        ValueError: The file is not a MedMNIST file, or its arrays do not match; nothing is written.
        FileExistsError: ``out`` exists.
        FileNotFoundError: ``file`` does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a MedMNIST .npz, or the name of a data set.")
    name = guess_name(file)
    if name is not None:
        check_name(name)
    splits = _checked(file)
    labels = {split: _labels(of) for split, (_, of) in splits.items()}
    names = _class_names(file, name, labels)
    total, done = sum(map(len, labels.values())), 0
    counts: dict[str, Counter[str]] = {}
    with atomic.new_folder(out) as folder:
        for split, (images, _) in splits.items():
            counts[split] = Counter(names[label] for label in labels[split])
            for label in names.values():
                (folder / split / label).mkdir(parents=True, exist_ok=True)
            for place, (pixels, label) in enumerate(zip(images.rows(), labels[split], strict=True)):
                (folder / split / names[label] / f"{place:05d}.png").write_bytes(encode_png(pixels))
                done += 1
                if progress is not None:
                    progress(done, total)
        for empty in [path for path in folder.glob("*/*") if not any(path.iterdir())]:
            empty.rmdir()  # a class without images in this split
    return counts


def fetch(name: str, size: int) -> Path:
    """Download the file of a data set with the medmnist package, which checks its MD5 and caches it.

    Raises ValueError if the package is not installed, or if the data set is unknown or cannot be downloaded.
    """
    check_name(name)
    if name not in CLASSES:
        raise ValueError(
            f"{name}: is neither a file nor a data set of MedMNIST; use one of {', '.join(CLASSES)}."
        )
    if size not in SIZES:
        raise ValueError(f"{name}: --size is {size}; use one of {', '.join(map(str, SIZES))}.")
    file = f"{name}.npz" if size == 28 else f"{name}_{size}.npz"
    otherwise = f"or download {file} from medmnist.com and give the file instead of the name"
    try:
        package: Any = importlib.import_module("medmnist")  # optional; importing it creates its cache folder
    except ImportError as error:
        raise ValueError(
            f"{name}: downloading it needs the package medmnist. Install medfocusclip[medmnist], {otherwise}."
        ) from error
    try:
        chosen = getattr(package, package.INFO[name]["python_class"])
        return Path(chosen(split="test", download=True, size=size).root) / file
    except (OSError, RuntimeError) as error:  # a network error; the package raises RuntimeError
        raise ValueError(
            f"{name}: cannot be downloaded ({type(error).__name__}). Check the network, {otherwise}."
        ) from error


def _checked(file: Path) -> dict[str, tuple[_Array, _Array]]:
    """Return the images and labels of each split after checking their shapes and types."""
    arrays = _arrays(file)
    checked: dict[str, tuple[_Array, _Array]] = {}
    for split in SPLITS:
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            missing = f"{split}_images" if images is None else f"{split}_labels"
            raise _fault(file, f"has no {missing}", "Download it again.")
        _check_images(images)
        if labels.shape[1:] not in ((), (1,)):
            fault = f"{labels.name} has {math.prod(labels.shape[1:])} labels per image instead of one"
            raise _fault(file, fault, "Use a data set that is not multi-label.")
        if labels.dtype.kind not in "iu":
            raise _fault(file, f"{labels.name} holds {labels.dtype}, not integers", "Download it again.")
        if labels.shape[0] != images.shape[0]:
            fault = f"has {images.shape[0]} {images.name} but {labels.shape[0]} {labels.name}"
            raise _fault(file, fault, "Download it again.")
        checked[split] = images, labels
    if "train" not in checked:
        raise _fault(
            file, f"has no train_images; it has {', '.join(arrays) or 'nothing'}", "Give a file of MedMNIST."
        )
    return checked


def _check_images(array: _Array) -> None:
    _, *size = array.shape
    flat = len(size) == 2 or (len(size) == 3 and size[2] == 3)
    if not flat and len(size) in (3, 4):
        shape = " x ".join(map(str, array.shape))
        raise _fault(
            array.file, f"{array.name} is {shape}: volumes, but only images are supported", "Use a 2D set."
        )
    if not flat or 0 in size or math.prod(size[:2]) > MOST_PIXELS:
        fault = f"{array.name} has shape {array.shape}, not (N, S, S) or (N, S, S, 3)"
        raise _fault(array.file, fault, "Download it again.")
    if array.dtype != np.uint8:
        fault = f"{array.name} holds {array.dtype}, not uint8"
        raise _fault(array.file, fault, "Scale its values to 0 to 255 and save them as uint8.")


def _labels(array: _Array) -> list[int]:
    return [int(row.reshape(-1)[0]) for row in array.rows()]


def _class_names(file: Path, name: str | None, labels: dict[str, list[int]]) -> dict[int, str]:
    present = sorted({label for values in labels.values() for label in values})
    if name is None:
        return {label: f"class_{label}" for label in present}
    names = dict(enumerate(CLASSES[name]))
    if unknown := [label for label in present if label not in names]:
        fault = f"has a label {unknown[0]}, but {name} has the classes 0 to {len(names) - 1}"
        raise _fault(file, fault, "Rename the file if it is another data set.")
    return names


def _arrays(file: Path) -> dict[str, _Array]:
    """Return the arrays of an .npz file by name, from their headers."""
    arrays: dict[str, _Array] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, fortran, dtype = _header(stream)
                if dtype.hasobject:
                    raise _fault(
                        file, f"{member} holds Python objects, which are not read", "Download it again."
                    )
                if fortran and len(shape) > 1:
                    raise _fault(file, f"{member} is stored in Fortran order", "Save it again in C order.")
                arrays[member.removesuffix(".npy")] = _Array(file, member.removesuffix(".npy"), shape, dtype)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise _fault(file, f"is not a valid .npz file ({error})", "Download it again.") from error
    return arrays


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, Fortran order and type of an array; leave the stream at its values."""
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(stream)
    except ValueError as error:
        raise ValueError(
            f"{getattr(stream, 'name', 'a member')}: is not a NumPy array ({error}). Download it again."
        ) from error


def _fault(file: Path, fault: str, fix: str) -> ValueError:
    return ValueError(f"{file}: {fault}. {fix}")
