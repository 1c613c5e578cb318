"""Benchmarks: how well concepts are erased, and how fast."""
