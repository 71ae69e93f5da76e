"""Benchmarks: each is one command that writes the ratios of one run, as JSON and a chart, to bench/out."""
