"""The client of the object store. Where it is, the configuration says, never a message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import boto3
from botocore.config import Config

# No colon: botocore would take an ARN for the name of a region and an endpoint.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the object store is; None means the usual AWS chain."""

    endpoint_url: str | None
    region: str | None


def is_bucket(name: str) -> bool:
    """Whether this is the name of a bucket, and no ARN, port or user name."""
    return _BUCKET.fullmatch(name) is not None


def new_client(options: S3Options, *, threads: int, connect_timeout_s: float, read_timeout_s: float) -> Any:
    """A boto3 client that never tries twice by itself; thread-safe."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        config=Config(
            # Tries are ours, within one deadline; botocore's would come on top of them.
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=threads,
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            tcp_keepalive=True,
            s3={"addressing_style": "path"} if options.endpoint_url else {},
            # Stores other than AWS fail on the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
