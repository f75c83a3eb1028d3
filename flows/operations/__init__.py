"""Jobs, retries, notices, the worker and the stack of servers.

It may import flows.release and all below.
"""
