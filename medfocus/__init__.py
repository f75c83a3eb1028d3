"""MedFocusCLIP: few-shot classification of medical pictures with region focus."""

__version__ = "0.1.0"
