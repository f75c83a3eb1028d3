"""Training of the two pocket models, a small SAM2 and a small CLIP, on phantoms alone. Not for clinical use.

``python -m medfocus.pocket`` draws the training images (``pool``), trains both models from a seed
(``sam2``, ``clip``, ``loop``) and measures them on held-out phantoms (``measure``). The weights have SAM2's
and open_clip's published formats and ship in ``medfocus/data`` as "pocket".

The room may import ``serving`` and the rooms below it.
"""
