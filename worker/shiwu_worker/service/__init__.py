"""The composition root: builds every part from the settings and connects them.

Front door: `bootstrap`. Commands that need one part without a worker use `factories`, `labels` and `model`.
"""
