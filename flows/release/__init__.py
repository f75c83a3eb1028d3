"""Registered models, their cards and the study's page. It may import flows.stages and all below."""
