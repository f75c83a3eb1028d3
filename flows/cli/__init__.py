"""The command ``medfocus``: an edge above the flows. Each command imports what it needs when it is run."""

from flows.cli.commands import app

__all__ = ["app"]
