"""SAM2's masks for large pictures: the same candidates and the same choice, for less work.

The segmenters of ``medfocus.masks`` import nothing from here, so that their keys, and with them the masks in
caches, do not depend on this code.
"""
