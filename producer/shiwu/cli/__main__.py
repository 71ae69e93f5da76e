"""Runs the command `shiwu` as `python -m shiwu.cli`."""

from shiwu.cli import main

main()
