"""A study: its params, folder, cells and costs. It may import medfocus and flows.servers."""
