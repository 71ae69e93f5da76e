"""Settings of the worker, read once from `SHIWU_*`.

Front door: `settings`; `views` groups them for the parts of the worker, `batches` gives the batch sizes and what a
worker holds because of them, `tuned` adds values measured for this machine, `types` reads single values, `errors`
reports wrong ones, `reference` lists all.
"""
