"""Benchmarks: one command each, ratios of one run, JSON and PNG in bench/out."""
