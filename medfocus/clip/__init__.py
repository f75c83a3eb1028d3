"""CLIP: images and texts become features, with regions, low-rank updates and learned prompts.

``build.build_clip`` makes an ``encoder.ClipEncoder``, which encodes images and texts. ``regions.REGIONS`` are
the ways to show the image encoder a region. ``lora.LoraTowers`` and ``prompt_learning.ContextTower`` train
parts of CLIP. ``features.encode_together`` computes and caches the features of many images. This room may
import datasets, images and storage.
"""
