"""Webhooks: a process that posts each answer to the endpoints that want it. Needs the extra `hooks`.

Front door: `__main__`, the command `shiwu-hooks`, and `command`, the commands `shiwu hooks …`.
"""

__all__: list[str] = []
