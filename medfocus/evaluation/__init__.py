"""Compute scores, comparisons, drift and promotion from arrays. This room imports no other room.

``metrics`` scores predictions, ``comparison`` tests systems against a baseline on the same images, ``drift``
measures how new images differ from known ones, and ``gate`` decides whether a challenger is promoted.
"""
