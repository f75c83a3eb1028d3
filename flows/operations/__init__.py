"""Everything around a flow: locks, retries, failures, notices, the worker and the stack of servers.

This room may import ``flows.release`` and everything below. ``stack`` runs all servers on one machine,
``worker`` serves the deployments of prefect.yaml, and ``ui`` shows the pages.
"""
