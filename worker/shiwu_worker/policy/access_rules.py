"""Access rules of the operator: hosts, networks, ports, buckets, folders. Deny lists win over all others."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from shiwu.network.address_rules import AddressRules

SPECIAL_BUCKETS: Final = ("--x-s3", "--xa-s3", "--op-s3", "-s3alias", "--ol-s3", ".mrap", "--table-s3")
"""Suffixes that AWS reserves for names of other things than buckets: S3 Express, Outposts, access points, tables.

For some the AWS SDK ignores the configured endpoint; others name a bucket of another account, or run code on objects.
"""


@dataclass(frozen=True, slots=True)
class AccessRules(AddressRules):
    """The operator's lists, each empty by default: those of addresses, buckets (which may end in `*`), and folders."""

    allow_buckets: tuple[str, ...] = ()
    """If not empty, no other bucket may be read."""
    deny_buckets: tuple[str, ...] = ()
    allow_folders: tuple[Path, ...] = ()
    deny_folders: tuple[Path, ...] = ()
    tells_refusals: bool = False
    """Whether an answer says that these rules refused the source."""


def is_special_bucket(name: str) -> bool:
    """Return whether AWS reserves the suffix of this name."""
    return name.lower().endswith(SPECIAL_BUCKETS)


def allows_bucket(access: AccessRules, bucket: str) -> bool:
    """Return whether the rules allow this bucket.

    A name with a suffix that AWS reserves needs an entry with such a suffix: `images*` does not allow `images--x-s3`.
    """
    if any(fnmatchcase(bucket, pattern) for pattern in access.deny_buckets):
        return False
    allowed = [pattern for pattern in access.allow_buckets if fnmatchcase(bucket, pattern)]
    if is_special_bucket(bucket):
        return any(is_special_bucket(pattern) for pattern in allowed)
    return bool(allowed) or not access.allow_buckets
