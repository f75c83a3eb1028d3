"""Data sets as they lie on disk: their lists, manifests, twins and splits.

It may import images and storage.
"""
