"""Supervised backbones: one of timm's image models, trained on the support's images without any text.

ResNet (He et al., arXiv 1512.03385), Res2Net (Gao et al., arXiv 1904.01169), ViT (Dosovitskiy et al.,
arXiv 2010.11929), Swin (Liu et al., arXiv 2103.14030), and whatever else timm has under a name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfocus.learning.method import IMAGES, Support
from medfocus.learning.training import train
from medfocus.storage import weights

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder

TUNINGS = ("full", "linear")
CACHE = "cache"  # the ``pretrained`` that means timm's own weights, where a download has left them
HUB_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")  # as timm looks for them
HEADS = ("head.fc", "head", "fc")  # where checkpoints of timm's older versions keep the classifier
OTHERWISE_SET = ("pretrained", "num_classes", "in_chans", "img_size", "features_only", "checkpoint_path")
Loss = Callable[[Tensor, Tensor], Tensor]  # of image indices (B,) and views (B,)
BATCH = 64  # images at a time where nothing trains


@dataclass
class Backbone:
    """A whole network, or with "linear" its last layer alone, trained by cross-entropy.

    With pretrained weights the first layer is repeated over further channels and scaled down, as timm does.
    """

    learns: ClassVar[bool] = True
    takes_views: ClassVar[bool] = True
    needs_towers: ClassVar[bool] = False
    encoder: ClipEncoder  # not asked for anything
    model: str  # a name of timm.list_models(), or it and a tag of its weights: "resnet18.a1_in1k"
    pretrained: str  # "" from scratch, a checkpoint in timm's format, or "cache"
    options: dict[str, Any]  # further arguments of timm.create_model: {"window_size": 3}
    image_size: int  # pixels a side to which images are resized
    tuning: str  # "full", or "linear": the body keeps its weights
    epochs: int
    max_steps: int  # a bound on epochs, in optimisation steps; one epoch is always made
    batch_size: int
    lr: float
    weight_decay: float
    model_: nn.Module = field(init=False, repr=False)  # in eval mode
    channels_: int = field(init=False)  # C of the images it was fitted on
    classes_: int = field(init=False)  # K

    def __post_init__(self) -> None:
        if self.tuning not in TUNINGS:
            raise ValueError(f"backbone: tuning is {self.tuning!r}; use one of {', '.join(TUNINGS)}.")
        for name in ("image_size", "epochs", "max_steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"backbone: {name} is {value}; use 1 or more.")
        if taken := [name for name in self.options if name in OTHERWISE_SET]:
            raise ValueError(
                f"backbone: options has {', '.join(taken)}, which the other fields or the images set. "
                "Take it out."
            )
        import timm  # takes seconds, which a study without backbones need not wait

        if not timm.is_model(self.model):
            near = ", ".join(difflib.get_close_matches(self.model, timm.list_models(), cutoff=0.4))
            raise ValueError(
                f"backbone: timm has no model '{self.model}' (near it: {near or 'nothing'}). Give a name "
                "that timm.list_models() has."
            )

    @property
    def embedding(self) -> str:
        """Nothing of CLIP is frozen: the images themselves."""
        return IMAGES

    @property
    def note(self) -> str:
        """Where the weights come from, for a table's reader."""
        if not self.pretrained:
            return "from scratch"
        if self.pretrained == CACHE:
            return f"pretrained: {self._published().hf_hub_id or self.model}"
        return f"pretrained: {Path(self.pretrained).name}"

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8, as they are."""
        return images

    def fit(self, support: Support, generator: torch.Generator) -> Self:
        """Train on the images (V, N, S, S, C) uint8; C is 3, 4 (region) or 6 (two images).

        Raises:
            ValueError: timm cannot build the model so, or the weights are another model's.
            FileNotFoundError: The pretrained weights are not on this machine.
        """
        images, labels = support.inputs, support.labels
        self.channels_, self.classes_ = images.shape[-1], len(support.text_features)
        with _seeded(generator.initial_seed()):  # of the weights' start and the dropout
            model = self._untrained(self.channels_, self.classes_).to(images.device)
            how = self._linear if self.tuning == "linear" else self._full
            trained, loss = how(model, support)
            train(
                trained.train().parameters(),
                loss,
                labels,
                views=len(images),
                epochs=self.epochs,
                max_steps=self.max_steps,
                batch_size=self.batch_size,
                lr=self.lr,
                weight_decay=self.weight_decay,
                generator=generator,
            )
        self.model_ = model.eval()
        return self

    def _full(self, model: nn.Module, support: Support) -> tuple[nn.Module, Loss]:
        """The whole network and its loss."""

        def loss(index: Tensor, view: Tensor) -> Tensor:
            index, view = _two_or_more(index, view, len(support.labels))
            logits = model(self._seen(model, support.inputs[view, index]))  # (B, K)
            return functional.cross_entropy(logits, support.labels[index])

        return model, loss

    def _linear(self, model: Any, support: Support) -> tuple[nn.Module, Loss]:
        """The last layer and its loss on features, which the frozen body computes once."""
        head = model.eval().get_classifier()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"backbone: the classifier of '{self.model}' is {type(head).__name__}, not one linear layer. "
                "Set tuning to full or take another model."
            )

        def embedded(images: Tensor) -> Tensor:
            return model.forward_head(model.forward_features(self._seen(model, images)), pre_logits=True)

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
        return {"head": torch.cat([model(self._seen(model, part)) for part in inputs.split(BATCH)])}

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> what the fitted ``model_`` takes, for a look into it."""
        return self._seen(self.model_, images)

    def state(self) -> dict[str, Tensor]:
        """The whole network with its running statistics, so that no other file is needed to predict."""
        network = {f"model.{name}": value for name, value in self.model_.state_dict().items()}
        return {"channels": torch.tensor(self.channels_), "classes": torch.tensor(self.classes_), **network}

    def load(self, state: dict[str, Tensor]) -> Self:
        """See ``Method.load``."""
        self.channels_, self.classes_ = int(state["channels"]), int(state["classes"])
        with _seeded(0):  # the start is overwritten, and nobody else's draws are to change
            self.model_ = self._built(self.channels_, self.classes_).eval()
        self.model_.load_state_dict(
            {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        )
        return self

    def _seen(self, model: nn.Module, images: Tensor) -> Tensor:
        """Images (B, S, S, C) uint8 -> what the model sees (B, C, image_size, image_size)."""
        side, channels = self.image_size, images.shape[-1]
        if channels not in (3, 4, 6):
            raise ValueError(f"backbone: images have {channels} channels; give 3, 4 (region) or 6 (two).")
        x = images.permute(0, 3, 1, 2).float() / 255
        if x.shape[-2:] != (side, side):
            x = functional.interpolate(x, (side, side), mode="bilinear", antialias=True)
        published: Any = model.pretrained_cfg
        mean, std = [*published["mean"]], [*published["std"]]
        if channels == 4:
            mean, std = [*mean, 0.5], [*std, 0.5]  # the region runs over [-1, 1]
        elif channels == 6:
            mean, std = mean * 2, std * 2
        return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]

    def _published(self) -> Any:
        """timm's record of the model's own weights."""
        import timm

        return timm.models.get_pretrained_cfg(self.model) or timm.models.PretrainedCfg()

    def _built(self, channels: int, classes: int, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network from scratch, or of weights in timm's format that have so many classes.

        timm fits published weights to another image size and number of channels.
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
            own = f" and the weights {self.pretrained}" if state is not None else ""
            raise ValueError(
                f"backbone: timm cannot build '{self.model}' at {self.image_size} px with options "
                f"{self.options}{own} ({reason}). Change image_size or options"
                + (", or give weights of this model." if own else ".")
            ) from error
        embedding: Any = getattr(model, "patch_embed", None)
        patch = int(embedding.patch_size[0]) if isinstance(embedding, PatchEmbed) else 1
        if self.image_size % patch:  # timm would leave the last pixels of every row and column unseen
            raise ValueError(
                f"backbone: image_size is {self.image_size}, but '{self.model}' sees patches of {patch} px. "
                f"Set image_size to a multiple of {patch}."
            )
        return model

    def _untrained(self, channels: int, classes: int) -> nn.Module:
        """The network before training; its classifier is new in any case."""
        model = self._built(channels, classes)
        if not self.pretrained:
            return model
        state = weights.load(self._file())
        named = self._published().classifier or ()
        heads = (named,) if isinstance(named, str) else tuple(named)  # a distilled model has two
        rows = [len(state[f"{head}.weight"]) for head in (*heads, *HEADS) if f"{head}.weight" in state]
        source = self._built(channels, rows[0] if rows else 0, state)
        own = tuple(f"{head}." for head in heads or HEADS)
        body = {name: value for name, value in source.state_dict().items() if not name.startswith(own)}
        model.load_state_dict(body, strict=False)
        return model

    def _file(self) -> Path:
        """The file of the pretrained weights, never fetched. Raises FileNotFoundError where it is not."""
        if self.pretrained != CACHE:
            return weights.resolve(self.pretrained, hub_id=None, filename=None, what="backbone: pretrained")
        import huggingface_hub
        from huggingface_hub import constants

        published = self._published()
        hub_id, url = published.hf_hub_id, published.url
        names = [*filter(None, [published.hf_hub_filename]), *HUB_FILES]
        looked = []
        if hub_id:
            for name in names:
                found = huggingface_hub.try_to_load_from_cache(hub_id, name)
                if isinstance(found, str):
                    return Path(found)
            looked.append(f"{' or '.join(names)} of the hub's '{hub_id}' in {constants.HF_HUB_CACHE}")
        if url:  # where timm's older versions and torch leave it
            file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
            if file.is_file():
                return file
            looked.append(str(file))
        none = f"timm has no weights of '{self.model}'"
        fault = f"there is no {', nor '.join(looked)}" if looked else none
        raise FileNotFoundError(
            f"backbone: pretrained is 'cache', but {fault}. Give the path of a .safetensors or .pth file in "
            "timm's format as pretrained, or '' to train from scratch"
            + (f", or run `hf download {hub_id} {names[0]}` where there is a network." if hub_id else ".")
        )


def _two_or_more(index: Tensor, view: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A batch of one gets the next image of the support: batch normalisation has no deviation of one."""
    if len(index) > 1:
        return index, view
    return torch.cat([index, (index + 1) % count]), view.expand(2)


def _tupled(value: Any) -> Any:
    """Lists, which is what YAML and JSON have, as the tuples that timm's models expect."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws of torch's global generator from ``seed``, and as if there had been none after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
