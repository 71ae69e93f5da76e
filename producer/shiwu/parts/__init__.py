"""Files of results in a folder or below a prefix of a bucket, complete or not there; and reading from buckets.

For extensions; boto3 and obstore are extras, and are imported inside functions.
"""

from __future__ import annotations

from shiwu.parts.errors import SourceError, TargetError, WrongSource, WrongTarget
from shiwu.parts.objects import ObjectName, Objects, split_address
from shiwu.parts.targets import Target, open_target

__all__ = [
    "ObjectName",
    "Objects",
    "SourceError",
    "Target",
    "TargetError",
    "WrongSource",
    "WrongTarget",
    "open_target",
    "split_address",
]
