"""Benchmarks: every figure a ratio inside one run. `python -m benchmarks --help`."""
