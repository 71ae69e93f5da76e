"""A live view of the service: the command `shiwu top`. Needs the extra `top`, except for `--once` and `--json`.

Front door: `command`.
"""

__all__: list[str] = []
