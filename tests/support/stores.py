"""Both clients of the object store, each with everything that is the same for them."""

from __future__ import annotations

from typing import Final

import pytest

from shiwu.network.http_client import HttpClient
from shiwu_worker.errors import JobError
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import FetchLimits, S3Addressing, S3Client, S3Options
from shiwu_worker.stages.fetch.fetcher import Fetcher
from shiwu_worker.stages.fetch.s3.base import ObjectStore, S3Limits
from shiwu_worker.stages.fetch.s3.factory import new_store
from tests.support.picture_server import Reply

CLIENTS: Final[tuple[S3Client, ...]] = ("boto3", "obstore")
each_client = pytest.mark.parametrize("client", CLIENTS)
BODY: Final = b"x" * 5000
PLAIN: Final = Reply(body=BODY)
SECRET: Final = "hush"
OWN_NAMES: Final = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": f"{SECRET}-token",
    # What lies in a developer's home, and what a machine of a cloud would tell, is not looked at.
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def make_fetcher(
    client: S3Client, endpoint_url: str | None, *, total_timeout_s: float = 20.0, read_timeout_s: float = 2.0
) -> Fetcher:
    """A fetcher of objects of at most 10,000 bytes."""
    limits = FetchLimits(10_000, total_timeout_s, connect_timeout_s=1.0, read_timeout_s=read_timeout_s)
    web = HttpClient(AccessRules(), threads=1, connect_timeout_s=1.0, read_timeout_s=1.0)
    return Fetcher(
        s3=S3Options(endpoint_url, "us-east-1", client), http_client=web, access=AccessRules(), limits=limits, threads=2
    )


def make_store(
    client: S3Client,
    endpoint_url: str | None,
    *,
    is_anonymous: bool = False,
    requester_pays: bool = False,
    user_agent: str = "shiwu",
    addressing: S3Addressing = "auto",
) -> ObjectStore:
    """The client alone."""
    options = S3Options(
        endpoint_url,
        "us-east-1",
        client,
        is_anonymous=is_anonymous,
        requester_pays=requester_pays,
        user_agent=user_agent,
        addressing=addressing,
    )
    limits = S3Limits(threads=2, connect_timeout_s=1.0, read_timeout_s=2.0, total_timeout_s=5.0)
    return new_store(options, limits)


def read(store: ObjectStore, key: str, *, bucket: str = "pictures", version: str | None = None) -> bytes:
    """One object."""
    with store.open(bucket, key, version=version) as body:
        return b"".join(iter(body.read, b""))


def failure(fetcher: Fetcher, reference: str) -> JobError:
    """The error that a fetch ends with. Neither it nor what the log gets tells a secret."""
    with pytest.raises(JobError) as caught:
        fetcher.fetch(reference)
    assert SECRET not in f"{caught.value} {caught.value.detail}"
    return caught.value
