"""Settings of the worker, read once from `SHIWU_*`.

Front door: `settings`; `views` groups them for the parts of the worker, `tuned` adds values measured for this machine,
`types` reads single values, `errors` reports wrong ones, `reference` lists all.
"""
