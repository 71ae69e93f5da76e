"""Commands of `shiwu-worker` (--check, --tune, --fetch-model, --convert), and the generator of docs/errors.md.

Only `__main__` imports them.
"""
