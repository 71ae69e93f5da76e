"""Access to S3 for lists and results: boto3 for single objects and odd keys, obstore for fast listings.

Both get endpoint, region and credentials from the AWS configuration and from the settings of a worker
(`SHIWU_S3_ENDPOINT_URL`, `SHIWU_S3_REGION`, `SHIWU_S3_ADDRESSING`, `SHIWU_S3_ANONYMOUS`, `SHIWU_S3_REQUESTER_PAYS`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from io import SEEK_SET, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shiwu.parts.errors import SourceError, TargetError, WrongSource

if TYPE_CHECKING:
    from obstore import ReadableFile
    from obstore.store import S3Store

CONNECT_TIMEOUT_S: Final = 5
READ_TIMEOUT_S: Final = 60
ATTEMPTS: Final = 5
MAX_SMALL_BYTES: Final = 16 * 1024 * 1024
"""A manifest that is read as a whole has at most this size."""
PAGE: Final = 1000
"""Keys in one reply of the store, which is its limit."""


@dataclass(frozen=True, slots=True)
class ObjectName:
    """One object of a listing. `etag` has no quotes."""

    key: str
    size: int
    modified: datetime
    etag: str


def split_address(address: str) -> tuple[str, str]:
    """The bucket and the key of s3://bucket/key; the key may be empty.

    Raises:
        WrongSource: it has no bucket.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not address.startswith("s3://") or not bucket:
        raise WrongSource(f"expected s3://bucket/…, got {address!r:.200}")
    return bucket, key


class Objects:
    """The object store. Used by one thread, or by two that each have their own."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = env = os.environ if environment is None else environment
        self._endpoint_url = env.get("SHIWU_S3_ENDPOINT_URL") or None
        self._region = env.get("SHIWU_S3_REGION") or None
        self._addressing = env.get("SHIWU_S3_ADDRESSING") or "auto"
        self._is_anonymous = _is_on(env.get("SHIWU_S3_ANONYMOUS"))
        self._requester_pays = _is_on(env.get("SHIWU_S3_REQUESTER_PAYS"))
        self._stores: dict[str, S3Store] = {}

    def copy(self) -> Objects:
        """The same access for another thread."""
        return Objects(self._environment)

    @cached_property
    def _session(self) -> Any:
        import boto3  # noqa: PLC0415 an extra, and half a second

        return boto3.session.Session()

    @cached_property
    def _client(self) -> Any:
        from botocore import UNSIGNED  # noqa: PLC0415 an extra
        from botocore.config import Config  # noqa: PLC0415 an extra

        style: Any = self._addressing if self._addressing != "auto" else "path" if self._endpoint_url else "auto"
        return self._session.client(
            "s3",
            endpoint_url=self._endpoint_url,
            region_name=self._region,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                signature_version=UNSIGNED if self._is_anonymous else None,
                s3={"addressing_style": style},
                # Stores other than AWS fail on the newer checksums.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    # -------------------------------------------------------------------------------- reading
    def pages(self, bucket: str, prefix: str, *, after: str) -> Iterator[list[ObjectName]]:
        """Yield pages of objects in the order of their keys, those after the key `after` only.

        obstore reads them, ten times as fast as boto3. A page with a key that obstore refuses or changes is read by
        boto3: keys with control characters, with empty or dotted parts, and those that begin or end with a slash.

        Raises:
            SourceError: the store refuses, or cannot be reached.
        """
        # obstore would list "/a" as "a".
        is_exact = not _is_plain(prefix.removesuffix("/") or "a")
        is_exact |= not prefix and next(self._exact_pages(bucket, "/", after=""), None) is not None
        while True:
            if not is_exact and _is_plain(after or "a"):
                try:
                    for page in self._fast_pages(bucket, prefix, after=after):
                        if any(not found.size for found in page):
                            break  # "folder/" looks like "folder" here; both have no bytes
                        yield page
                        after = page[-1].key
                    else:
                        return
                except _odd_key():
                    pass
            page = next(self._exact_pages(bucket, prefix, after=after), [])
            if not page:
                return
            yield page
            after = page[-1].key

    def _fast_pages(self, bucket: str, prefix: str, *, after: str) -> Iterator[list[ObjectName]]:
        import obstore  # noqa: PLC0415 an extra

        store = self._store(bucket)
        options: dict[str, Any] = {"offset": after} if after else {}
        with _store_errors(f"s3://{bucket}/{prefix}", SourceError):
            for page in obstore.list(store, prefix=prefix or None, chunk_size=PAGE, **options):
                yield [
                    ObjectName(found["path"], found["size"], found["last_modified"], (found["e_tag"] or "").strip('"'))
                    for found in page
                ]

    def _exact_pages(self, bucket: str, prefix: str, *, after: str) -> Iterator[list[ObjectName]]:
        parameters: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE}
        if self._requester_pays:
            parameters["RequestPayer"] = "requester"
        with _store_errors(f"s3://{bucket}/{prefix}", SourceError):
            while True:
                reply = self._client.list_objects_v2(**parameters, **({"StartAfter": after} if after else {}))
                page = [
                    ObjectName(found["Key"], found["Size"], found["LastModified"], found.get("ETag", "").strip('"'))
                    for found in reply.get("Contents", ())
                ]
                if page:
                    yield page
                    after = page[-1].key
                if not page or not reply.get("IsTruncated"):
                    return

    def read(self, address: str) -> bytes:
        """The bytes of one small object.

        Raises:
            SourceError: it is missing, refused or too large.
        """
        bucket, key = split_address(address)
        with _store_errors(address, SourceError), closing(self._object_body(bucket, key)) as body:
            raw: bytes = body.read(MAX_SMALL_BYTES + 1)
        if len(raw) > MAX_SMALL_BYTES:
            raise SourceError(f"expected at most {MAX_SMALL_BYTES} bytes at {address}, got more")
        return raw

    def _object_body(self, bucket: str, key: str) -> Any:
        return self._client.get_object(Bucket=bucket, Key=key)["Body"]

    @contextmanager
    def open(self, address: str) -> Iterator[RawIOBase]:
        """One object as a file that reads any place of it, a mebibyte at a time.

        Raises:
            SourceError: it is missing or refused; also while it is read.
        """
        import obstore  # noqa: PLC0415 an extra

        bucket, key = split_address(address)
        with _store_errors(address, SourceError):
            yield _ObjectFile(obstore.open_reader(self._store(bucket), key))

    def download(self, address: str, path: Path) -> None:
        """Write one object to a file.

        Raises:
            SourceError: it is missing or refused.
        """
        bucket, key = split_address(address)
        with _store_errors(address, SourceError):
            self._client.download_file(bucket, key, str(path))

    # -------------------------------------------------------------------------------- writing
    def upload(self, path: Path, address: str) -> None:
        """Store a file as an object, in parts where it is large.

        Raises:
            TargetError: the store refuses, or cannot be reached.
        """
        bucket, key = split_address(address)
        with _store_errors(address, TargetError):
            self._client.upload_file(str(path), bucket, key)

    def put(self, raw: bytes, address: str) -> None:
        """Store bytes as an object. Raises as `upload`."""
        bucket, key = split_address(address)
        with _store_errors(address, TargetError):
            self._client.put_object(Bucket=bucket, Key=key, Body=raw)

    def move(self, old: str, new: str) -> None:
        """Copy an object of at most 5 GB to another name in its bucket, and delete the old one. Raises as `upload`."""
        bucket, key = split_address(old)
        target_bucket, target_key = split_address(new)
        with _store_errors(new, TargetError):
            self._client.copy_object(Bucket=target_bucket, Key=target_key, CopySource={"Bucket": bucket, "Key": key})
            self._client.delete_object(Bucket=bucket, Key=key)

    def delete(self, address: str) -> None:
        """Delete an object; a missing one is no error. Raises as `upload`."""
        bucket, key = split_address(address)
        with _store_errors(address, TargetError):
            self._client.delete_object(Bucket=bucket, Key=key)

    def names(self, address: str) -> list[str]:
        """The keys below s3://bucket/prefix/, without the prefix. Raises as `upload`."""
        bucket, prefix = split_address(address)
        try:
            pages = list(self._exact_pages(bucket, prefix, after=""))
        except SourceError as error:
            raise TargetError(str(error)) from None
        return [found.key.removeprefix(prefix) for page in pages for found in page]

    # -------------------------------------------------------------------------------- obstore
    def _store(self, bucket: str) -> S3Store:
        from obstore.store import S3Store  # noqa: PLC0415 an extra

        if bucket not in self._stores:
            endpoint = self._client.meta.endpoint_url
            is_virtual = self._addressing == "virtual" or (self._addressing == "auto" and self._endpoint_url is None)
            if is_virtual:
                scheme, _, host = endpoint.partition("://")
                endpoint = f"{scheme}://{bucket}.{host}"
            self._stores[bucket] = S3Store(
                bucket,
                endpoint=endpoint,
                region=self._client.meta.region_name,
                virtual_hosted_style_request=is_virtual,
                skip_signature=self._is_anonymous,
                request_payer=self._requester_pays,
                credential_provider=None if self._is_anonymous else self._credential,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "connect_timeout": f"{CONNECT_TIMEOUT_S}s",
                    "timeout": f"{READ_TIMEOUT_S}s",
                },
                retry_config={"max_retries": ATTEMPTS},
            )
        return self._stores[bucket]

    def _credential(self) -> Any:
        found = self._session.get_credentials()
        if found is None:
            raise SourceError("expected AWS credentials, found none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key or "",
            "secret_access_key": frozen.secret_key or "",
            "token": frozen.token,
            "expires_at": getattr(found, "_expiry_time", None),
        }


class _ObjectFile(RawIOBase):
    """An object as a file of Python; obstore's own file has other types."""

    def __init__(self, reader: ReadableFile) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()

    def readinto(self, buffer: Any) -> int:
        found = self._reader.read(len(buffer))
        buffer[: len(found)] = memoryview(found)
        return len(found)


def _is_on(text: str | None) -> bool:
    return (text or "").lower() in {"1", "true", "yes", "on"}


def _is_plain(key: str) -> bool:
    """Whether obstore takes this key and does not change it."""
    return key.isprintable() and not {"", ".", ".."} & set(key.split("/"))


def _odd_key() -> tuple[type[Exception], ...]:
    """The errors of obstore about a key that it cannot represent."""
    from obstore.exceptions import InvalidPathError  # noqa: PLC0415 an extra

    return (InvalidPathError,)


@contextmanager
def _store_errors(what: str, kind: type[SourceError | TargetError]) -> Iterator[None]:
    """Convert errors of the libraries; those about odd keys pass."""
    from boto3.exceptions import Boto3Error  # noqa: PLC0415 an extra
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 an extra
    from obstore.exceptions import BaseError  # noqa: PLC0415 an extra

    try:
        yield
    except _odd_key():
        raise
    except (BotoCoreError, ClientError, Boto3Error, BaseError, OSError) as error:
        lines = str(error).strip().splitlines()
        raise kind(f"{what}: {type(error).__name__}: {lines[0] if lines else 'no text'}") from None
