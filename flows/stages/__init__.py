"""The stages of dvc.yaml, one module and one command each, and the calls to DVC.

``dvc.reproduce`` brings a stage up to date, ``scoring`` scores checkpoints, and ``rebuild`` fits and scores
one cell again. The room may import flows.study, flows.servers and medfocus.
"""
