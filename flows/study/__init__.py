"""A study: its parameters, paths, cells, data sets and costs.

``study.Study`` is an opened study, ``cells.plan`` lists its cells, and ``dataset.EncodedDataset`` returns the
features of their images. The room may import medfocus and flows.servers.
"""
