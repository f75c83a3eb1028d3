"""Turn images and texts into CLIP features, with regions, low-rank updates and learned prompts.

``build.build_clip`` makes an ``encoder.ClipEncoder``, which encodes images and texts. ``towers`` has the
kinds of image encoder and text tower. ``regions.REGIONS`` are ways to show a region to the image encoder.
``lora.LoraTowers``, ``svd.SvdTowers`` and ``prompt_learning.ContextTower`` train parts of CLIP.
``features.encode_together`` computes and caches the features of many images. This room may import datasets,
images and storage.
"""
