"""The composition root: builds every part from the settings and connects them.

Front door: `bootstrap`; `factories`, `model` and `observability` build the parts.
"""
