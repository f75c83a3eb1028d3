"""Files, caches and weights on disk. This room imports no other room.

``atomic`` writes files and folders that appear complete or not at all, ``shards`` is the cache of small
entries, and ``fingerprint`` computes cache keys from code. ``tables`` reads tables and writes CSV,
``weights`` loads checkpoints, and ``redaction`` removes the texts of errors before they are stored.
"""
