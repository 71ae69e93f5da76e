"""Benchmarks: one command each, the ratios of one run, JSON and a picture in bench/out."""
