"""Score: compares image vectors with label vectors.

Front door: `scorer`, `label_bank`, `label_files`, `label_warnings`.
"""
