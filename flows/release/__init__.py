"""The release of a study: registered models, their cards and the study's page.

This room may import ``flows.stages`` and everything below. ``register.register_best`` registers a data set's
best cell, and ``page.write_page`` writes reports/index.html.
"""
