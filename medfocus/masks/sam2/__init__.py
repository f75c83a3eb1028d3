"""Segmentation with SAM2 (arXiv 2408.00714).

``segmenter.Sam2Segmenter`` prompts SAM2 without labels; ``model`` loads the network and ``edges`` refines
outlines. ``fast_segmenter`` gives the same masks of large images for less work. ``adapter`` trains SAM2 on
known regions. ``retrieval`` chooses among SAM2's proposals by a text.

The room may import the modules of ``medfocus.masks`` and the rooms that these may import.
"""
