"""Measurements of the served product, each run by `python -m benchmarks.NAME`."""
