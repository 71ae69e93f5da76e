"""Runs tests with the lowest and the highest versions that pyproject.toml allows, and with other Pythons."""
