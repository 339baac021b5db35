"""Runs to metrics to reports: `python -m evaluate RUNS`."""
