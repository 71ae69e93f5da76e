"""The object store with obstore, which wraps Rust's object_store.

botocore provides the endpoint and the credentials, as for boto3.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import obstore
from botocore.credentials import ReadOnlyCredentials
from botocore.utils import get_environ_proxies
from obstore.exceptions import (
    AlreadyExistsError,
    InvalidPathError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from shiwu_worker.errors import JobError
from shiwu_worker.policy.limits import S3Options
from shiwu_worker.stages.fetch.error_table import UNKNOWN, obstore_row
from shiwu_worker.stages.fetch.s3.base import (
    MAX_BUCKET_CLIENTS,
    NotModified,
    ObjectBody,
    S3Limits,
    StoreDefect,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    WrongName,
    is_aws,
    virtual_url,
)
from shiwu_worker.stages.fetch.s3.boto import ClientCache, S3Access, as_store_errors

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Credential

UNUSABLE_PROXY_URL: Final = "http://127.0.0.1:0"
"""A proxy to which no connection is possible."""
STATUSES: Final[dict[type[Exception], int]] = {
    FileNotFoundError: 404,
    PermissionDeniedError: 403,
    UnauthenticatedError: 401,
    PreconditionError: 412,
    AlreadyExistsError: 409,
    NotModifiedError: 304,
}
_STATUS: Final = re.compile(r"Server returned non-2xx status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>\s*([\w.]{1,64})\s*</Code>", re.ASCII)
_KIND: Final = re.compile(r"HttpError \{\s*kind: (\w+)|source: (Header) \{")


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """The endpoint as botocore found it."""

    url: str
    region: str
    authorities: bytes | None


class ObstoreStore:
    """An `ObjectStore`. No code of obstore may run before the process has forked for the last time."""

    def __init__(self, options: S3Options, limits: S3Limits) -> None:
        # One thread, because it only moves bytes; the default is one per core. Read when the first thread starts.
        os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
        self._options = options
        self._limits = limits
        self._clients = ClientCache(options, limits)
        self._endpoint: _Endpoint | None = None
        self._stores: OrderedDict[str, tuple[ReadOnlyCredentials | None, S3Store]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def open(self, bucket: str, key: str, *, version: str | None, etag: str | None = None) -> Iterator[ObjectBody]:
        """Request one object."""
        store = self._store(bucket)
        if key.startswith("/") or key.endswith("/"):  # otherwise obstore would request the key without the slash
            raise _wrong_key()
        with _as_store_errors(key, has_version=version is not None):
            try:
                found = obstore.get(store, key, options=_get_options(version, etag))
            except NotModifiedError as error:
                if etag is not None:
                    raise NotModified from error
                raise
            except (ValueError, InvalidPathError) as error:
                raise _wrong_key() from error
            # Small chunks, so that the reader can check the deadline however slowly they arrive.
            chunks = found.stream(min_chunk_size=1)
            yield ObjectBody(lambda: next(chunks, b""), found.meta["size"], found.meta["e_tag"])

    def _store(self, bucket: str) -> S3Store:
        with self._lock, as_store_errors():
            access = self._clients.get()
            if self._endpoint is None:
                self._endpoint = _find_endpoint(access)
            known, store = self._stores.get(bucket, (None, None))
            if store is None or known != access.credentials:
                store = _new_store(bucket, self._endpoint, access.credentials, self._options, self._limits)
                self._stores[bucket] = (access.credentials, store)
            self._stores.move_to_end(bucket)
            if len(self._stores) > MAX_BUCKET_CLIENTS:
                self._stores.popitem(last=False)
            return store


def _get_options(version: str | None, etag: str | None) -> GetOptions:
    options: GetOptions = {}
    if version is not None:
        options["version"] = version
    if etag is not None:
        options["if_none_match"] = etag
    return options


def _find_endpoint(access: S3Access) -> _Endpoint:
    bundle = access.session.get_config_variable("ca_bundle")
    region = access.client.meta.region_name
    return _Endpoint(
        url=access.client.meta.endpoint_url,
        region="us-east-1" if region == "aws-global" else region,
        authorities=Path(bundle).read_bytes() if bundle else None,
    )


def _new_store(
    bucket: str, endpoint: _Endpoint, credentials: ReadOnlyCredentials | None, options: S3Options, limits: S3Limits
) -> S3Store:
    url = endpoint.url
    is_usual = options.endpoint_url is None and is_aws(url)
    if options.addressing == "virtual" or (options.addressing == "auto" and is_usual):
        url = virtual_url(url, bucket)
    has_host = url != endpoint.url
    return S3Store(
        bucket,
        # All options are set, because obstore would otherwise read variables that boto3 does not know.
        endpoint=url,
        aws_endpoint_url_s3=url,
        region=endpoint.region,
        virtual_hosted_style_request=has_host,
        skip_signature=credentials is None,
        request_payer=options.requester_pays,
        credential_provider=None if credentials is None else partial(_credential, credentials),
        client_options=_client_options(url, endpoint, options, limits),
        retry_config={"max_retries": 0},
    )


def _credential(credentials: ReadOnlyCredentials) -> S3Credential:
    return {
        "access_key_id": credentials.access_key or "",
        "secret_access_key": credentials.secret_key or "",
        "token": credentials.token,
        "expires_at": None,
    }


def _client_options(url: str, endpoint: _Endpoint, options: S3Options, limits: S3Limits) -> ClientConfig:
    parts = urlsplit(url)
    proxy = get_environ_proxies(url).get(parts.scheme)
    config: ClientConfig = {
        "allow_http": parts.scheme == "http",
        "allow_invalid_certificates": False,
        "connect_timeout": _ms(limits.connect_timeout_s),
        "read_timeout": _ms(limits.read_timeout_s),
        "timeout": _ms(limits.total_timeout_s),
        "pool_max_idle_per_host": str(limits.threads),
        "user_agent": options.user_agent,
    }
    if proxy:
        config["proxy_url"] = proxy if "://" in proxy else f"http://{proxy}"
        config["proxy_excludes"] = ""
    else:
        # obstore always follows redirects and sends the session token along; this proxy ends them at the first step.
        config["proxy_url"] = UNUSABLE_PROXY_URL
        config["proxy_excludes"] = parts.hostname or ""
    if endpoint.authorities is not None:
        config["root_certificate"] = endpoint.authorities
    return config


def _ms(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _wrong_key() -> WrongName:
    return WrongName(
        "expected a key that obstore can ask for: no empty, '.' or '..' part between slashes, no control character "
        "(SHIWU_S3_CLIENT=boto3 takes any)"
    )


@contextmanager
def _as_store_errors(key: str, *, has_version: bool) -> Iterator[None]:
    try:
        yield
    except (StoreError, JobError, NotModified):
        raise
    except BaseException as error:  # a Rust panic is no Exception and would end the thread
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _store_error(error, key, has_version=has_version) from error
        raise


def _store_error(error: BaseException, key: str, *, has_version: bool) -> StoreError:
    """The store error for an error of obstore, whose text has addresses, and for some types the producer's key."""
    text = str(error)
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), None)
    if status is not None:
        text = text.partition(key)[2]
    elif found := _STATUS.search(text):
        status, text = int(found[1]), text[found.end() :]
    elif "Received redirect without LOCATION" in text:
        status = 301
    if status is not None:
        code = _CODE.search(text)
        return StoreRefused(code[1] if code else "", status, has_version=has_version)
    match = _KIND.search(text)
    kind = match and (match[1] or match[2])
    why = f"{type(error).__name__}{f', {kind}' if kind else ''}"
    is_cut = isinstance(error, OSError)
    return StoreUnavailable(why) if is_cut or obstore_row(kind) is not UNKNOWN else StoreDefect(why)
