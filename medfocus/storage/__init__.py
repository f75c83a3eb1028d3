"""Files, caches and weights on disk, and errors without their text. It imports no other room."""
