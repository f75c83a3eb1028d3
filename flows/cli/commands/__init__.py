"""The commands of ``medfocus``: arguments, help and printed results. Each imports its work when it runs."""
