"""Masks that know more than the picture: what to look for in words, or known regions of training pictures.

The segmenters of ``medfocus.masks`` import nothing from here, so that their keys, and with them the masks in
caches, do not depend on this code.
"""
