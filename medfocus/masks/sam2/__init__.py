"""Masks of SAM2, plain, fast, taught or chosen by words.

It may import what masks may, and their common modules.
"""
