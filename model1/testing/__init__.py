"""Helpers of tests and benchmarks: comparison, timing, compilation. The library imports none."""
