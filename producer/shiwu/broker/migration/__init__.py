"""Moves a database of an earlier version to the names of this one. Other packages import from here.

`check_names` refuses a database that still holds jobs under old names; `move_names` moves them. See
docs/decisions/0047-names-in-redis-are-those-of-the-glossary.md.
"""

from shiwu.broker.migration.move import MAX_MOVED, Moved, find_workers, move_names, plan_moves
from shiwu.broker.migration.old_names import OLD_RETENTION, OldNames, check_names

__all__ = [
    "MAX_MOVED",
    "OLD_RETENTION",
    "Moved",
    "OldNames",
    "check_names",
    "find_workers",
    "move_names",
    "plan_moves",
]
