"""The command ``medfocus``.

This is the topmost room and may import everything. ``commands`` declares the commands and prints their
results; the other modules do the work and are imported only when a command runs, so that help is quick.
"""

from flows.cli.commands.app import app

__all__ = ["app"]
