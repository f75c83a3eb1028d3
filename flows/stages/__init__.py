"""The stages of dvc.yaml, each a command, and DVC.

It may import flows.study, flows.servers and medfocus.
"""
