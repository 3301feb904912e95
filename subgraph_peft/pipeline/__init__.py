"""Pipelines: configurations, passes, runs, data, models, reports."""
