"""SAM2's network out of a configuration and a checkpoint: the image modules and its predictor.

The sam2 package's configurations and modules, without those for video (arXiv 2408.00714).
"""

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

from medfocus.storage import weights

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_image_predictor import SAM2ImagePredictor

SIZE_STEP = 32  # pixels: patches of 4 in windows of 8

# What an image needs of a checkpoint; the rest serves video, and may be absent.
IMAGE_MODULES = ("image_encoder.", "sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
# As sam2.build_sam does: an unstable single mask gives way to the best of the three.
_DYNAMIC_MULTIMASK = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
_SIZE_LETTERS = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def load_predictor(
    config: str, checkpoint: str, image_size: int, *, device: str = "cpu"
) -> tuple[SAM2ImagePredictor, str]:
    """Build SAM2's image modules and its image predictor; also its key, which names weights and config.

    Args:
        config: "pocket", a configuration of the sam2 package ("configs/sam2.1/sam2.1_hiera_t.yaml",
            "sam2.1_hiera_t" or "sam2.1_hiera_tiny"), or the path of a YAML file of the same shape.
        checkpoint: "pocket", the packaged weights of the configuration "pocket"; a local path; a hub id such
            as "facebook/sam2.1-hiera-tiny"; or "random:SEED", which is weights that have learnt NOTHING: for
            clocks and tests, its masks mean nothing at all.
        image_size: Pixels a side that the model sees, a multiple of 32; it needs not be the config's own.
        device: Where the model runs. It is no part of the key.

    Raises:
        FileNotFoundError: There is no such configuration or checkpoint.
        ValueError: The image size does not fit, the checkpoint is not one of this configuration, or the
            configuration names anything but the sam2 package's own modules; nothing of it was called then.
    """
    if image_size < SIZE_STEP or image_size % SIZE_STEP:
        near = max(SIZE_STEP, round(image_size / SIZE_STEP) * SIZE_STEP)
        raise ValueError(
            f"image_size is {image_size}; SAM2 takes multiples of {SIZE_STEP} pixels, {near} for one."
        )
    seed, state = 0, None
    if checkpoint.startswith("random:"):
        if not checkpoint.removeprefix("random:").isdigit():
            raise ValueError(
                f"checkpoint is {checkpoint!r}; random weights are spelt random:0, random:1, ..."
            )
        seed = int(checkpoint.removeprefix("random:"))
    else:
        hub_id = checkpoint if checkpoint.count("/") == 1 else None
        hub_name = checkpoint.rpartition("/")[2].replace("-", "_") + ".pt"  # as facebook/sam2.1-hiera-* do
        name = str(_packaged("data/sam2_pocket.safetensors")) if checkpoint == "pocket" else checkpoint
        path = weights.resolve(name, hub_id=hub_id, filename=hub_name, what="masks.checkpoint (SAM2)")
        state = weights.load(path)

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    settings = _read_config(config, image_size)
    # Building draws random numbers; the caller's generators stay as they are.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model: SAM2Base = instantiate(settings, _recursive_=True)
    if state is not None:
        _load_image_modules(model, state, f"SAM2 checkpoint {checkpoint}", config)
    model = model.eval().requires_grad_(False).to(device)

    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its transforms call torch.jit.script
        predictor = SAM2ImagePredictor(model)
    # The class has the sizes of 1024 px written in. Strides 4, 8 and 16:
    predictor._bb_feat_sizes = [(image_size // stride, image_size // stride) for stride in (4, 8, 16)]
    image_modules = {k: v for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}
    parts = (OmegaConf.to_yaml(settings), weights.digest(image_modules), version("sam2"))
    return predictor, "\n".join(parts)


def _read_config(config: str, image_size: int) -> DictConfig:
    """The model's settings of a configuration, for images of ``image_size`` and without video."""
    from omegaconf import DictConfig, OmegaConf

    content = OmegaConf.load(config_path(config))
    model = content.get("model") if isinstance(content, DictConfig) else None
    if not isinstance(model, DictConfig) or "_target_" not in model:
        raise ValueError(
            f"SAM2 config {config!r}: it has no section 'model' with a '_target_'. "
            "Start from one of the sam2 package's configs/."
        )
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
                f"SAM2 config {config!r}: it asks to build {target!r}, which is no module of sam2.modeling. "
                "That could run any code, so it was refused. Start from one of the sam2 package's configs/."
            )
    return model


def _targets(content: object) -> Iterator[object]:
    """What a configuration would have called, at any depth, and what is still to be filled in."""
    if isinstance(content, dict):
        if "_target_" in content:
            yield content["_target_"]
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _targets(value)
    elif isinstance(content, str) and "${" in content:  # escaped once, it would become anything later on
        yield content


def _is_of_sam2(target: object) -> bool:
    """Whether ``target`` is a network's class where it is written, and nothing that its file imports."""
    module, _, name = str(target).rpartition(".")
    if not f"{module}.".startswith("sam2.modeling."):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:  # a.b.os.system: b.os is no module
        return False
    return isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__ == module


def config_path(config: str) -> Path:
    """The file of a configuration's name; see ``load_predictor``. FileNotFoundError lists the names."""
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
            f"SAM2 config {config!r} is no file and no configuration of the sam2 package. "
            f"Known: pocket, {', '.join(sorted(known))}."
        )
    return known[short]


def _packaged(name: str) -> Path:
    """A file that travels in the package."""
    return Path(str(importlib.resources.files("medfocus").joinpath(name)))


def _load_image_modules(model: SAM2Base, state: dict[str, torch.Tensor], place: str, config: str) -> None:
    """Load what an image needs of a checkpoint, all of it; what serves video may be absent or there."""
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(IMAGE_MODULES)}
    given = {k: v for k, v in state.items() if k.startswith(IMAGE_MODULES)}
    faults = [f"{k} is missing" for k in wanted if k not in given]
    faults += [f"{k} is not known" for k in given if k not in wanted]
    faults += [
        f"{k} has shape {tuple(given[k].shape)}, not {tuple(shape)}"
        for k, shape in wanted.items()
        if k in given and given[k].shape != shape
    ]
    if faults:
        raise ValueError(
            f"{place} does not fit the config {config!r}: {len(faults)} of {len(wanted)} tensors differ "
            f"({'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}). "
            "Name the config that the weights were made for."
        )
    model.load_state_dict(given, strict=False)
