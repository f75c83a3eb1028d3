"""Data sets on disk: from folders and tables to records, duplicates and splits.

This room may import images and storage. ``ingest`` reads a data set into ``records`` and reports its
``faults``; ``listing`` and ``scan`` are its two steps. ``duplicates`` finds copies, ``splits`` draws test and
support sets, ``pseudonyms`` replaces patient ids, and ``medmnist`` and ``coco`` convert other formats.
"""
