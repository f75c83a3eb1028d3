"""CLIP's towers, prompts and features, and what changes them.

It may import datasets, images and storage.
"""
