"""Orchestration: the stages of the pipeline and the flow over them."""
