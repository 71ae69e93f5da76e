"""Settings of the worker, read once from `SHIWU_*`.

Front door: `settings`; `types` reads single values, `errors` reports wrong ones, `reference` lists all.
"""
