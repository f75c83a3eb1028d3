"""Load SAM2 (arXiv 2408.00714): the sam2 package's modules for images, without its modules for video."""

from __future__ import annotations

import importlib
import importlib.resources
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medfocus.masks.sam2.trunk import ConvTrunk
from medfocus.storage import weights

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor

# The only class outside the sam2 package that a configuration may name.
TRUNK_TARGET = f"{ConvTrunk.__module__}.{ConvTrunk.__name__}"
SIZE_STEP = 32  # pixels: windows of 8 patches of 4 pixels
_SAM2_SIZE = 512  # pixels per side, by default in the sam2 package
_FAR = 2  # factor between the size of an image and the size in training that gives a warning

# The modules that segment images. The others serve video and may be missing from a checkpoint.
IMAGE_MODULES = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
# As in sam2.build_sam: the best of the three masks replaces an unstable single mask.
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_SIZE_LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def load_predictor(
    config: str, checkpoint: str, image_size: int | None, *, device: str = "cpu"
) -> tuple[SAM2ImagePredictor, str]:
    """Build SAM2's image predictor; return it, and a key of its weights and configuration.

    Args:
        config: "pocket", a configuration of the sam2 package ("configs/sam2.1/sam2.1_hiera_t.yaml",
            "sam2.1_hiera_t" or "sam2.1_hiera_tiny"), or the path of a YAML file in the same format.
        checkpoint: "pocket" for the packaged weights, a local path, a hub id such as
            "facebook/sam2.1-hiera-tiny", or "random:SEED". Random weights are untrained: they serve timing
            and tests, and their masks are meaningless.
        image_size: Pixels per side that the model sees, a multiple of 32; None for the configuration's. A
            size far from the configuration's, at which the weights were trained, gives a warning.
        device: Device of the model. It does not change the key.

    Raises:
        FileNotFoundError: The configuration or checkpoint does not exist.
        ValueError: The image size is not a multiple of 32, the checkpoint does not fit the configuration, or
            the configuration names anything but modules of the sam2 package and ``TRUNK_TARGET`` (refused
            before any call).
    """
    image_size = image_size or trained_size(config)
    if image_size < SIZE_STEP or image_size % SIZE_STEP:
        near = max(SIZE_STEP, round(image_size / SIZE_STEP) * SIZE_STEP)
        raise ValueError(
            f"image_size is {image_size}; SAM2 takes multiples of {SIZE_STEP} pixels. Use {near}."
        )
    seed, state = 0, None
    path = locate(checkpoint)
    if path is None:
        seed = int(checkpoint.removeprefix("random:"))
    else:
        warn_of_size(config, image_size)
        state = weights.load(path)

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    settings = _read_config(config, image_size)
    # Building draws random numbers; fork_rng keeps the state of the caller's generators.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model: SAM2Base = instantiate(settings, _recursive_=True)
    if state is not None:
        _load_image_modules(model, state, f"SAM2 checkpoint {checkpoint}", config)
    model = model.eval().requires_grad_(False).to(device)

    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # SAM2's transforms call torch.jit.script
        predictor = SAM2ImagePredictor(model)
    # The predictor assumes 1024 px, so set the sizes of its levels: strides 4, 8 and 16.
    predictor._bb_feat_sizes = [(image_size // stride, image_size // stride) for stride in (4, 8, 16)]
    image_modules = {k: v for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}
    parts = (OmegaConf.to_yaml(settings), weights.digest(image_modules), version("sam2"))
    return predictor, "\n".join(parts)


def locate(checkpoint: str) -> Path | None:
    """Find the file of a checkpoint, or return None for random weights; see ``load_predictor``."""
    if checkpoint.startswith("random:"):
        if not checkpoint.removeprefix("random:").isdigit():
            raise ValueError(f"checkpoint is {checkpoint!r}. For random weights use random:0, random:1, ...")
        return None
    if checkpoint == "pocket":
        return _packaged("data/sam2_pocket.safetensors")
    hub_id = checkpoint if checkpoint.count("/") == 1 else None
    hub_name = checkpoint.rpartition("/")[2].replace("-", "_") + ".pt"  # as in facebook/sam2.1-hiera-*
    return weights.resolve(checkpoint, hub_id=hub_id, filename=hub_name, what="masks.checkpoint (SAM2)")


def learns_interest(config: str) -> bool:
    """Return whether the models of a configuration learn the strategy "interest"; published SAM2 does not."""
    from omegaconf import OmegaConf

    return OmegaConf.select(_read_model(config)[1], "image_encoder.trunk._target_") == TRUNK_TARGET


def check_interest(config: str) -> None:
    """Raise ValueError if the models of a configuration have not learnt the strategy "interest"."""
    if not learns_interest(config):
        raise ValueError(
            f"masks.strategy is 'interest', but the model of the SAM2 config {config!r} has not learnt to "
            "find a region without a prompt. Set masks.strategy to grid."
        )


def trained_size(config: str) -> int:
    """Return the image size of a configuration, at which its published weights were trained."""
    return int(_read_model(config)[1].get("image_size", _SAM2_SIZE))


def size_fault(config: str, image_size: int | None) -> str:
    """Return a sentence if an image size is far from the size of the configuration, else ""."""
    trained = trained_size(config)
    if not image_size or trained / _FAR <= image_size <= trained * _FAR:
        return ""
    return (
        f"masks.image_size is {image_size}, but the weights of the configuration {config} were trained at "
        f"{trained} px, so expect poor masks"
    )


def warn_of_size(config: str, image_size: int | None) -> None:
    """Warn once in a process if an image size is far from the size of the configuration."""
    if fault := size_fault(config, image_size):
        # One place in the code warns, so Python shows an equal warning once.
        warnings.warn(f"{fault}. Set it to null for {trained_size(config)} px.", stacklevel=1)


def _read_model(config: str) -> tuple[DictConfig, DictConfig]:
    """Read a configuration; return its content and, in it, the settings of its model."""
    from omegaconf import DictConfig, OmegaConf

    content = OmegaConf.load(config_path(config))
    model = content.get("model") if isinstance(content, DictConfig) else None
    if not isinstance(content, DictConfig) or not isinstance(model, DictConfig) or "_target_" not in model:
        raise ValueError(
            f"SAM2 config {config!r} has no section 'model' with a '_target_'. "
            "Start from one of the sam2 package's configs/."
        )
    return content, model


def _read_config(config: str, image_size: int) -> DictConfig:
    """Read a configuration and return the settings of its model for ``image_size``, without video."""
    from omegaconf import OmegaConf

    content, model = _read_model(config)
    model.image_size = image_size
    model.memory_attention = None
    model.memory_encoder = None
    model.sam_mask_decoder_extra_args = {
        **(model.get("sam_mask_decoder_extra_args") or {}),
        **_DYNAMIC_MULTIMASK,
    }
    OmegaConf.resolve(content)
    for target in _targets(OmegaConf.to_container(model)):
        if not _is_of_sam2(target):
            raise ValueError(
                f"SAM2 config {config!r} asks to build {target!r}, which is no module of sam2.modeling; "
                "it was refused because it could run any code. Start from one of the sam2 package's configs/."
            )
    return model


def _targets(content: object) -> Iterator[object]:
    """Yield everything that a configuration would call, at any depth, and every unresolved string."""
    if isinstance(content, dict):
        if "_target_" in content:
            yield content["_target_"]
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _targets(value)
    elif (
        isinstance(content, str) and "${" in content
    ):  # an escaped interpolation: Hydra would resolve it later
        yield content


def _is_of_sam2(target: object) -> bool:
    """Return whether ``target`` is ``TRUNK_TARGET`` or a network of sam2.modeling, named by its module."""
    if target == TRUNK_TARGET:
        return True
    module, _, name = str(target).rpartition(".")
    if not f"{module}.".startswith("sam2.modeling."):
        return False
    try:
        value = getattr(importlib.import_module(module), name, None)
    except ImportError:  # a.b.os.system: b.os is not a module
        return False
    return isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module


def config_path(config: str) -> Path:
    """Return the file of a configuration; see ``load_predictor``. FileNotFoundError lists known names."""
    if config == "pocket":
        return _packaged("configs/sam2_pocket.yaml")
    local = Path(config).expanduser()
    if local.is_file():
        return local
    package = Path(str(importlib.resources.files("sam2")))
    if (package / config).is_file():
        return package / config
    short = config.removesuffix(".yaml")
    for word, letter in _SIZE_LETTERS.items():
        short = re.sub(f"_{word}$", f"_{letter}", short)
    folders = ("sam2", "sam2.1")
    known = {path.stem: path for folder in folders for path in package.glob(f"configs/{folder}/*.yaml")}
    if short not in known:
        raise FileNotFoundError(
            f"SAM2 config {config!r} is neither a file nor a configuration of the sam2 package. "
            f"Known: pocket, {', '.join(sorted(known))}."
        )
    return known[short]


def _packaged(name: str) -> Path:
    """Return a file of this package."""
    return Path(str(importlib.resources.files("medfocus").joinpath(name)))


def _load_image_modules(model: SAM2Base, state: dict[str, torch.Tensor], place: str, config: str) -> None:
    """Load all image modules from a checkpoint and ignore its video modules."""
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}
    tensors = {k: v for k, v in state.items() if k.startswith(IMAGE_MODULES)}
    faults = [f"{k} is missing" for k in wanted if k not in tensors]
    faults += [f"{k} is unknown" for k in tensors if k not in wanted]
    faults += [
        f"{k} has shape {tuple(tensors[k].shape)}, not {tuple(shape)}"
        for k, shape in wanted.items()
        if k in tensors and tensors[k].shape != shape
    ]
    if faults and any(key.startswith("vision_encoder.") for key in state):
        raise ValueError(
            f"{place} is in the format of the package transformers, not of sam2. Use the .pt file of the "
            "same repository, such as sam2.1_hiera_tiny.pt."
        )
    if faults:
        raise ValueError(
            f"{place} does not fit the config {config!r}: {len(faults)} of {len(wanted)} tensors differ "
            f"({'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}). "
            "Set masks.config to the configuration of these weights."
        )
    model.load_state_dict(tensors, strict=False)
