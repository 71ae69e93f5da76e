"""The keys of a watcher beside the list of MinIO, perhaps in another Redis. Formats only grow."""

from __future__ import annotations


def taken_key(events_key: str, watcher: str) -> str:
    """The list of messages that a watcher has taken and whose jobs may not be enqueued yet."""
    return f"{events_key}:taken:{watcher}"


def watchers_key(events_key: str) -> str:
    """The sorted set of watchers: name → server time in ms at which the watcher was last seen."""
    return f"{events_key}:watchers"
