"""The two pocket models: a small SAM2 and a small CLIP, trained from a seed on drawn images alone.

``make pocket`` draws their pools, trains both, and measures them on held-out phantoms (``__main__.py``).
What it writes is in SAM2's and open_clip's published formats; ``medfocus.masks.sam2.segmenter`` and
``medfocus.clip.encoder`` load it under the name "pocket". Not for clinical use.
"""
