"""Webhooks: a process that posts each answer to the endpoints that want it. Needs the extra `hooks`.

Front door: `endpoints`, `signatures`.
"""

__all__: list[str] = []
