"""Measures, comparisons and the rules of promotion, on numbers alone. It may import storage."""
