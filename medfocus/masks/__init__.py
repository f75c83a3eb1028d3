"""Segment images without labels: one mask per image.

A segmenter (``segmenter.Segmenter``) turns images into masks. ``factory.build_segmenter`` builds one from
``settings``: Otsu's threshold (``otsu``) or SAM2 (``sam2``). Both propose regions, and ``candidates``
chooses among them. ``store.MaskStore`` caches masks for all studies; ``published.publish`` writes the masks
of one manifest. ``quality`` compares masks with known regions.

The room may import ``datasets``, ``images`` and ``storage``. Only the modules of ``sam2`` import PyTorch.
"""
