"""`python -m shiwu.cli`."""

from shiwu.cli import main

main()
