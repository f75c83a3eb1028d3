"""Segment images with SAM2 (arXiv 2408.00714).

``segmenter.Sam2Segmenter`` prompts SAM2 without labels; ``model`` loads the network and ``edges`` refines
outlines. ``fast_segmenter`` makes the same masks of large images, up to rounding, with less work.
``adapter`` trains SAM2 on known regions. ``retrieval`` chooses a proposal of SAM2 by a text.

This room may import ``medfocus.masks`` and everything that ``medfocus.masks`` may import.
"""
