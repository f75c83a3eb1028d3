"""What all methods share: their protocol, training, probes and validation.

It may import clip and all below.
"""
