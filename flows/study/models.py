"""The models of a study, built as its params.yaml describes them: segmenters, image and text encoders."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flows.study.params import Params
from flows.study.study import Study
from medfocus.clip.regions import REGIONS
from medfocus.datasets.records import read_manifest
from medfocus.masks import factory
from medfocus.masks.settings import OtsuSettings, Sam2Settings, SegmenterSettings

if TYPE_CHECKING:
    from medfocus.clip.encoder import ClipEncoder
    from medfocus.masks.sam2.segmenter import Sam2Segmenter
    from medfocus.masks.segmenter import Segmenter


def check_weights(study: Study) -> None:
    """Find the weights of a study's models, and warn of a size that does not suit them, before any work.

    Raises FileNotFoundError and ValueError as the functions that build the models do.
    """
    from medfocus.clip.sources import locate
    from medfocus.masks.sam2 import model

    params, masks = study.params, study.params.masks
    with contextlib.chdir(study.folder):
        locate(params.clip.model, params.clip.pretrained)
        if masks.segmenter == "sam2":
            model.locate(masks.checkpoint)
            model.warn_of_size(masks.config, masks.image_size)
            if masks.strategy == "interest":
                model.check_interest(masks.config)


def segmenter_settings(study: Study, dataset: str) -> SegmenterSettings:
    """Return the settings of a data set's segmenter, or of the SAM2 that an adapter or texts guide."""
    masks = study.params.masks
    keep = masks.keep.get(study.params.datasets[dataset].modality, 1)
    if masks.segmenter == "otsu":
        return OtsuSettings(keep, masks.min_area, masks.max_area)
    return Sam2Settings(
        masks.config,
        masks.checkpoint,
        masks.image_size,
        {"retrieved": "grid", "adapter": "box"}.get(masks.strategy, masks.strategy),
        points_per_side=masks.points_per_side,
        keep=keep,
        min_area=masks.min_area,
        max_area=masks.max_area,
        follow_edges=masks.follow_edges,
    )


def build_segmenter(study: Study, dataset: str, adapter: Path | None = None) -> Segmenter:
    """Build the segmenter that the masks section describes for a data set.

    ``adapter`` is the file of the strategy "adapter", by default the published one.

    Raises FileNotFoundError if that file is missing, and ValueError as ``anatomy_texts`` does.
    """
    masks, state, rank = study.params.masks, None, None
    if masks.segmenter == "sam2" and masks.strategy == "retrieved":
        texts = anatomy_texts(study, dataset)  # reports a fault before seconds of loading
        from medfocus.clip.build import build_clip
        from medfocus.masks.sam2.retrieval import TextRank

        params = study.params.clip
        clip = build_clip(params.model, params.pretrained, device(study), resize=params.resize)
        rank = TextRank.of(clip, texts)
    elif masks.segmenter == "sam2" and masks.strategy == "adapter":
        path = adapter or study.paths.adapter(dataset)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no adapter. Run the masks stage, which trains it.")
        from medfocus.storage import weights

        state = weights.load(path)
    return factory.build_segmenter(
        segmenter_settings(study, dataset),
        adapter=state,
        rank=rank,
        batch_size=masks.batch_size,
        device=device(study),
    )


def build_sam2(study: Study, dataset: str) -> Sam2Segmenter:
    """Build a data set's SAM2 segmenter, without retrieval or adapter."""
    settings = segmenter_settings(study, dataset)
    assert isinstance(settings, Sam2Settings)
    return factory.build_sam2(settings, batch_size=study.params.masks.batch_size, device=device(study))


def anatomy_texts(study: Study, dataset: str) -> tuple[str, ...]:
    """Return the texts by which the strategy "retrieved" chooses a data set's masks.

    Raises ValueError if there is none, or if one names a class, because the mask would then reveal the label.
    """
    settings = study.params.datasets[dataset]
    texts = study.params.masks.anatomy.get(settings.modality, ())
    if not texts:
        raise ValueError(
            f"params.yaml: masks.strategy is 'retrieved', but masks.anatomy has no text for "
            f"{settings.modality}, the modality of {dataset}. Add one that says where to look, such as "
            "'the lungs' or 'a lesion'."
        )
    manifest = study.paths.manifest(dataset)
    labels = {record.label for record in read_manifest(manifest)} if manifest.is_file() else set()
    for name in sorted({*labels, *settings.names, *settings.names.values()}):
        for text in texts:
            if f" {_words(name)} " in f" {_words(text)} ":
                raise ValueError(
                    f"params.yaml: masks.anatomy.{settings.modality} has the text {text!r}, which names "
                    f"the class {name!r} of {dataset}. Name anatomy, such as 'the lungs' or 'a lesion'."
                )
    return texts


def build_encoder(study: Study, focus: str = "none") -> ClipEncoder:
    """Build the frozen encoders of the clip section, with an input for the region if ``focus`` needs one.

    SAM2 stands ready in them if a method asks for its features. Raises ValueError if a method does, but the
    masks are not from SAM2.
    """
    from medfocus.clip.build import build_clip  # takes seconds

    params = study.params
    clip = params.clip
    encoder = build_clip(clip.model, clip.pretrained, device(study), resize=clip.resize)
    users = [name for name in params.study.methods if params.method(name)[1].get("segmenter_grid")]
    if users and params.masks.segmenter != "sam2":
        raise ValueError(
            f"params.yaml: methods.{users[0]}.segmenter_grid asks for SAM2's features, but "
            f"masks.segmenter is {params.masks.segmenter!r}. Set it to sam2, or segmenter_grid to 0."
        )
    if users:
        encoder = encoder.with_segmenter(build_sam2(study, next(iter(params.datasets))))
    return region_encoder(params, encoder, focus)


def region_encoder(params: Params, encoder: ClipEncoder, focus: str) -> ClipEncoder:
    """Return the encoder for a focus mode, with an input for the region if the mode needs one."""
    if focus not in REGIONS:
        return encoder
    return encoder.with_region(focus, params.views.attention_bias, params.clip.alpha)


def device(study: Study) -> str:
    """Return the device of a study's models, "cpu" or "cuda"."""
    if study.params.device != "auto":
        return study.params.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _words(text: str) -> str:
    """Return a text in lower case, without underscores and punctuation, one space between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
