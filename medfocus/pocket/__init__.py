"""Training of the two pocket models, a small SAM2 and a small CLIP. Not for clinical use.

``python -m medfocus.pocket`` draws phantoms (``pool``), reads pairs of an image and its mask if there are any
(``pairs``), trains both models from a seed (``sam2``, ``clip``, ``loop``) and measures them on held-out
images (``measure``). The weights have SAM2's and open_clip's published formats and ship in ``medfocus/data``
as "pocket".

The room may import ``serving`` and the rooms below it.
"""
