"""Bucket events become jobs: the command `shiwu watch`. Needs the extra `watch`.

Front door: `command`.
"""

__all__: list[str] = []
