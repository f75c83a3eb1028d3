"""Supervised backbones: any of timm's image models, trained on the support's images without text.

Among them are ResNet (He et al., arXiv 1512.03385), Res2Net (Gao et al., arXiv 1904.01169), ViT (Dosovitskiy
et al., arXiv 2010.11929) and Swin (Liu et al., arXiv 2103.14030).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.frozen import ImageMethod
from medfocus.learning.method import Support, with_prefix
from medfocus.learning.training import Loss, Schedule, seeded, train
from medfocus.storage import weights

TUNINGS = ("full", "linear")
CACHE = "cache"  # value of ``pretrained`` for timm's published weights, from the local download cache
HUB_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")  # as timm tries them
HEADS = ("head.fc", "head", "fc")  # names of the classifier in checkpoints of older timm versions
SET_ELSEWHERE = ("pretrained", "num_classes", "in_chans", "img_size", "features_only", "checkpoint_path")
BATCH = 64  # images per pass without gradients


@dataclass
class Backbone(Schedule, ImageMethod):
    """A whole network, or with "linear" only its last layer, trained by cross-entropy.

    If images have more than 3 channels, timm repeats and rescales the pretrained first layer over them.
    """

    takes_views: ClassVar[bool] = True
    model: str  # a name of timm.list_models(), with or without a tag of weights: "resnet18.a1_in1k"
    pretrained: str  # "" to train from scratch, a checkpoint in timm's format, or "cache"
    options: dict[str, Any]  # more arguments of timm.create_model: {"window_size": 3}
    image_size: int  # pixels a side of the resized images
    tuning: str  # "full", or "linear": the body stays frozen
    max_steps: int  # upper bound on optimisation steps; the first epoch always runs in full
    model_: nn.Module = field(init=False, repr=False)  # in eval mode
    channels_: int = field(init=False)  # C of the training images
    classes_: int = field(init=False)  # K

    def __post_init__(self) -> None:
        if self.tuning not in TUNINGS:
            raise ValueError(f"backbone: tuning is {self.tuning!r}; use one of {', '.join(TUNINGS)}.")
        for name in ("image_size", "epochs", "max_steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"backbone: {name} is {value}; use 1 or more.")
        if taken := [name for name in self.options if name in SET_ELSEWHERE]:
            raise ValueError(
                f"backbone: options has {', '.join(taken)}, set by other fields or by the images. Remove it."
            )
        import timm  # slow to import, and only backbones need it

        if not timm.is_model(self.model):
            near = ", ".join(difflib.get_close_matches(self.model, timm.list_models(), cutoff=0.4))
            raise ValueError(
                f"backbone: timm has no model '{self.model}' (similar: {near or 'none'}). Use a name from "
                "timm.list_models()."
            )

    @property
    def runs_encoder(self) -> bool:
        """True, because every fit runs the network on the images, even with a frozen body."""
        return True

    @property
    def note(self) -> str:
        """See ``Method.note``."""
        if not self.pretrained:
            return "from scratch"
        if self.pretrained == CACHE:
            return f"pretrained: {self._published().hf_hub_id or self.model}"
        return f"pretrained: {Path(self.pretrained).name}"

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train on the images (V, N, S, S, C) uint8; C is 3, 4 (region) or 6 (two images).

        Raises:
            ValueError: timm cannot build the model with these settings, or the weights are of another model.
            FileNotFoundError: The pretrained weights are not on this machine.
        """
        images, labels = support.inputs, support.labels
        self.channels_, self.classes_ = images.shape[-1], len(support.text_features)
        with seeded(generator.initial_seed()):  # for the initial weights and the dropout
            model = self.untrained(self.channels_, self.classes_).to(images.device)
            tuned = self._linear if self.tuning == "linear" else self._full
            trained, loss = tuned(model, support)
            train(
                trained.train().parameters(),
                loss,
                labels,
                self,
                views=len(images),
                generator=generator,
                max_steps=self.max_steps,
            )
        self.model_ = model.eval()
        return self

    def _full(self, model: nn.Module, support: Support) -> tuple[nn.Module, Loss]:
        """Return the whole network and its loss."""

        def loss(index: Tensor, view: Tensor) -> Tensor:
            index, view = at_least_two(index, view, len(support.labels))
            logits = model(self.prepare(model, support.inputs[view, index]))  # (B, K)
            return functional.cross_entropy(logits, support.labels[index])

        return model, loss

    def _linear(self, model: Any, support: Support) -> tuple[nn.Module, Loss]:
        """Return the last layer and its loss on features, which the frozen body computes once."""
        head = model.eval().get_classifier()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"backbone: the classifier of '{self.model}' is {type(head).__name__}, not one linear layer. "
                "Set tuning to full or use another model."
            )

        def embedded(images: Tensor) -> Tensor:
            return model.forward_head(model.forward_features(self.prepare(model, images)), pre_logits=True)

        with torch.no_grad():
            views = [torch.cat([embedded(part) for part in view.split(BATCH)]) for view in support.inputs]
        features = torch.stack(views)  # (V, N, F)

        def loss(index: Tensor, view: Tensor) -> Tensor:
            return functional.cross_entropy(head(features[view, index]), support.labels[index])

        return head, loss

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> dict[str, Tensor]:
        """Images (N, S, S, C) uint8 -> logits (N, K)."""
        model = self.model_
        return {"head": torch.cat([model(self.prepare(model, part)) for part in inputs.split(BATCH)])}

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> input of the fitted ``model_``, for attribution."""
        return self.prepare(self.model_, images)

    def state(self) -> dict[str, Tensor]:
        """Return the whole network with its running statistics: prediction needs no other file."""
        sizes = {"channels": torch.tensor(self.channels_), "classes": torch.tensor(self.classes_)}
        return {**sizes, **self.model_.state_dict(prefix="model.")}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.channels_, self.classes_ = int(state["channels"]), int(state["classes"])
        with seeded(0):  # the initial weights are drawn and then overwritten
            self.model_ = self._built(self.channels_, self.classes_).eval()
        self.model_.load_state_dict(with_prefix(state, "model."))
        return self

    def prepare(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> normalised input of ``model`` (B, C, image_size, image_size)."""
        side, channels = self.image_size, images.shape[-1]
        if channels not in (3, 4, 6):
            raise ValueError(f"backbone: images have {channels} channels; give 3, 4 (region) or 6 (two).")
        x = images.permute(0, 3, 1, 2).float() / 255
        if x.shape[-2:] != (side, side):
            x = functional.interpolate(x, (side, side), mode="bilinear", antialias=True)
        published: Any = model.pretrained_cfg
        mean, std = [*published["mean"]], [*published["std"]]
        if channels == 4:
            mean, std = [*mean, 0.5], [*std, 0.5]  # maps the region to [-1, 1]
        elif channels == 6:
            mean, std = mean * 2, std * 2
        return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]

    def _published(self) -> Any:
        """Return timm's configuration of the model's published weights."""
        import timm

        return timm.models.get_pretrained_cfg(self.model) or timm.models.PretrainedCfg()

    def _built(self, channels: int, classes: int, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Build the network from scratch, or from weights in timm's format with this number of classes.

        timm adapts the weights to the image size and the number of channels.
        """
        import timm
        from timm.layers.patch_embed import PatchEmbed

        arguments = {name: _tupled(value) for name, value in self.options.items()}
        try:
            if self._published().fixed_input_size:
                arguments["img_size"] = self.image_size
            if state is not None:
                arguments["pretrained_cfg_overlay"] = {"state_dict": dict(state), "num_classes": classes}
            model = timm.create_model(
                self.model, pretrained=state is not None, num_classes=classes, in_chans=channels, **arguments
            )
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            reason = str(error).strip() or type(error).__name__
            source = f" and the weights {self.pretrained}" if state is not None else ""
            raise ValueError(
                f"backbone: timm cannot build '{self.model}' at {self.image_size} px with options "
                f"{self.options}{source} ({reason}). Change image_size or options"
                + (", or give weights of this model." if source else ".")
            ) from error
        embedding: Any = getattr(model, "patch_embed", None)
        patch = int(embedding.patch_size[0]) if isinstance(embedding, PatchEmbed) else 1
        if self.image_size % patch:  # timm would ignore the last pixels of every row and column
            raise ValueError(
                f"backbone: image_size is {self.image_size}, but '{self.model}' has patches of {patch} px. "
                f"Set image_size to a multiple of {patch}."
            )
        return model

    def untrained(self, channels: int, classes: int) -> nn.Module:
        """Return the network before training, with pretrained weights except for the classifier."""
        model = self._built(channels, classes)
        if not self.pretrained:
            return model
        state = weights.load(self._file())
        named = self._published().classifier or ()
        heads = (named,) if isinstance(named, str) else tuple(named)  # a distilled model has two
        rows = [len(state[f"{head}.weight"]) for head in (*heads, *HEADS) if f"{head}.weight" in state]
        source = self._built(channels, rows[0] if rows else 0, state)
        new = tuple(f"{head}." for head in heads or HEADS)
        body = {name: value for name, value in source.state_dict().items() if not name.startswith(new)}
        model.load_state_dict(body, strict=False)
        return model

    def _file(self) -> Path:
        """Return the local file of the pretrained weights. Raises FileNotFoundError if there is none."""
        if self.pretrained != CACHE:
            return weights.resolve(self.pretrained, hub_id=None, filename=None, what="backbone: pretrained")
        import huggingface_hub
        from huggingface_hub import constants

        published = self._published()
        hub_id, url = published.hf_hub_id, published.url
        names = [*filter(None, [published.hf_hub_filename]), *HUB_FILES]
        searched = []
        if hub_id:
            for name in names:
                cached = huggingface_hub.try_to_load_from_cache(hub_id, name)
                if isinstance(cached, str):
                    return Path(cached)
            searched.append(f"{' or '.join(names)} of '{hub_id}' in {constants.HF_HUB_CACHE}")
        if url:  # the download cache of older timm versions and of torch
            file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
            if file.is_file():
                return file
            searched.append(str(file))
        none = f"timm has no weights of '{self.model}'"
        fault = f"there is no {', nor '.join(searched)}" if searched else none
        raise FileNotFoundError(
            f"backbone: pretrained is 'cache', but {fault}. Set pretrained to a .safetensors or .pth file in "
            "timm's format, or to '' to train from scratch"
            + (f", or run `hf download {hub_id} {names[0]}` with network access." if hub_id else ".")
        )


def at_least_two(index: Tensor, view: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Add the next image of the support to a batch of one, because batch normalisation needs two."""
    if len(index) > 1:
        return index, view
    return torch.cat([index, (index + 1) % count]), view.expand(2)


def _tupled(value: Any) -> Any:
    """Convert the lists of YAML and JSON to the tuples that timm's models expect."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
