"""Servers as child processes: MLflow's, Prefect's and PostgreSQL's.

This room imports no other room. ``processes`` starts a child process and ends it with all its descendants.
"""
