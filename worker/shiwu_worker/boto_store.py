"""The object store by boto3."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from shiwu_worker.object_store import (
    CHUNK,
    Body,
    NoCredentials,
    S3Limits,
    S3Options,
    StoreAway,
    StoreRefused,
    WrongName,
)


class BotoStore:
    """An `ObjectStore`; the client is made when the first object is asked for."""

    def __init__(self, options: S3Options, limits: S3Limits) -> None:
        self._options = options
        self._limits = limits
        self._client: Any = None
        self._lock = threading.Lock()

    @contextmanager
    def open(self, bucket: str, key: str, *, version: str | None) -> Iterator[Body]:
        """Ask for one object."""
        more = {} if version is None else {"VersionId": version}
        with as_store_errors():
            answer = self._made().get_object(Bucket=bucket, Key=key, **more)
            with answer["Body"] as body:
                # read1, or a piece would be waited for until it is whole, however slowly it comes.
                yield Body(lambda: body.read1(CHUNK), answer.get("ContentLength"))

    def _made(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = new_client(boto3.session.Session(), self._options, self._limits)
            return self._client


def new_client(session: boto3.session.Session, options: S3Options, limits: S3Limits) -> Any:
    """A boto3 client that never tries twice by itself; thread-safe."""
    return session.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        config=Config(
            # Tries are ours, within one deadline; botocore's would come on top of them.
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=limits.threads,
            connect_timeout=limits.connect_timeout_s,
            read_timeout=limits.read_timeout_s,
            tcp_keepalive=True,
            s3={"addressing_style": "path"} if options.endpoint_url else {},
            # Stores other than AWS fail on the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


@contextmanager
def as_store_errors() -> Iterator[None]:
    """Say in the words of `object_store` what botocore says in its own."""
    try:
        yield
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        raise StoreRefused(str(error.response.get("Error", {}).get("Code", "")), status) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise NoCredentials from error
    except ParamValidationError as error:
        raise WrongName("expected a bucket and key that S3 accepts") from error
    except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
        raise StoreAway(type(error).__name__) from error
