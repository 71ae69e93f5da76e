"""Checks the object store and the credentials of the worker, for `shiwu-worker --check`.

A store checks the signature of a request before it looks for the object. So a reply about the object or about missing
permissions proves the credentials; a reply about the signature, the key or the clock shows that they are wrong.
"""

from __future__ import annotations

from typing import Any, Final

from shiwu.contract import ErrorCode, without_logins
from shiwu_worker.config import views
from shiwu_worker.config.settings import Settings
from shiwu_worker.policy.limits import S3Options
from shiwu_worker.stages.fetch.s3.base import NoCredentials, S3Limits, StoreRefused, is_aws
from shiwu_worker.stages.fetch.s3.boto import ClientCache, as_store_errors
from shiwu_worker.stages.fetch.s3.factory import new_store

PROBE: Final = "shiwu-check"
"""Name of a key and of a bucket that may not exist."""
TIMEOUT_S: Final = 5.0
HINT: Final = "name a bucket in SHIWU_ALLOW_BUCKETS to have it checked"
_ABOUT_THE_OBJECT: Final = frozenset({ErrorCode.SOURCE_NOT_FOUND, ErrorCode.SOURCE_FORBIDDEN})
_NO_LISTING: Final = frozenset({405, 501})


def check_s3(settings: Settings) -> tuple[str, tuple[str, ...]]:
    """Return what was proved, and warnings about what was not.

    Raises:
        StoreError: the store does not answer, or refuses the credentials.
    """
    options, limits = views.s3_options(settings), _limits(settings)
    try:
        access = ClientCache(options, limits).get()
    except NoCredentials as error:
        if error.__cause__ is not None:  # only one of key and secret is set
            raise
        return "no credentials: jobs with s3:// references will be answered source_credentials", ()
    how = "without credentials (SHIWU_S3_ANONYMOUS)"
    if (credentials := access.session.get_credentials()) is not None and not settings.s3_anonymous:
        how = f"credentials from {credentials.method}"
    endpoint = access.client.meta.endpoint_url
    bucket = next((name for name in settings.allow_buckets if "*" not in name), None)
    if bucket is not None:
        proved, warnings = _ask_object(options, limits, bucket)
    else:
        if not is_aws(endpoint):
            _access(options, limits)
        proved, warnings = ("", (f"not proved that objects can be read: {HINT}",))
        if not settings.s3_anonymous:
            proved, warnings = _list_buckets(access.client)
    where = without_logins(endpoint)
    parts = filter(
        None, (f"{where} answers {settings.s3_client}" if bucket or not is_aws(endpoint) else where, how, proved)
    )
    return "; ".join(parts), warnings


def _limits(settings: Settings) -> S3Limits:
    connect_s = min(settings.connect_timeout_s, TIMEOUT_S)
    return S3Limits(threads=1, connect_timeout_s=connect_s, read_timeout_s=TIMEOUT_S, total_timeout_s=2 * TIMEOUT_S)


def _access(options: S3Options, limits: S3Limits) -> None:
    """Request a bucket that may not exist from a store other than AWS, with the client of the worker."""
    try:
        with new_store(options, limits).open(PROBE, PROBE, version=None):
            pass
    except StoreRefused as error:
        if error.row.code not in _ABOUT_THE_OBJECT:
            raise


def _ask_object(options: S3Options, limits: S3Limits, bucket: str) -> tuple[str, tuple[str, ...]]:
    """Request an object that may not exist from a bucket that the operator allows by name."""
    try:
        with new_store(options, limits).open(bucket, PROBE, version=None):
            return f"objects of {bucket} can be read", ()
    except StoreRefused as error:
        if error.row.code not in _ABOUT_THE_OBJECT or error.code == "NoSuchBucket":
            raise
        if error.row.code is ErrorCode.SOURCE_NOT_FOUND:
            return f"bucket {bucket} answers", ()
        # Stores reply this also if the object does not exist and listing is not allowed.
        return f"bucket {bucket} was asked", (f"not proved that objects of {bucket} can be read ({error.code})",)


def _list_buckets(client: Any) -> tuple[str, tuple[str, ...]]:
    """List the buckets, which needs a valid signature and no bucket name."""
    try:
        with as_store_errors():
            count = len(client.list_buckets().get("Buckets") or ())
    except StoreRefused as error:
        if error.status in _NO_LISTING or error.code == "403":
            return "the credentials were not proved", (f"the store does not list buckets ({error}); {HINT}",)
        if error.row.code is not ErrorCode.SOURCE_FORBIDDEN:
            raise
        reason = f"they may not list buckets ({error.code}); {HINT}"
        return "the credentials were accepted", (f"not proved that objects can be read: {reason}",)
    return f"the credentials were accepted and list {count} buckets", ()
