"""The operator's endpoints: read from YAML with their secrets, and which answers each of them wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from shiwu.cli.yaml_files import FileError, read_text, read_yaml
from shiwu.client.results import TagResult
from shiwu.contract import NAME_PATTERN, Lane, Status, printable, reference_error, source_of
from shiwu.contract.validation_text import expectation, expected_and_got
from shiwu.hooks.signatures import read_secret, read_seed

MAX_BATCH: Final = 100
MAX_ENDPOINTS: Final = 1000
MAX_SECRET_FILE_BYTES: Final = 4096


class EndpointsError(ValueError):
    """The file of endpoints or a secret is wrong; the text says what was expected, without the secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One receiver. `key` names it in Redis, logs and metrics; keys of URLs from requests are their origins."""

    key: str
    url: str
    keys: tuple[bytes, ...] = field(repr=False)
    """The current secret, and during a rotation the old one; for Aliyun's style the seed."""
    on: frozenset[str] = frozenset(Status)
    lane: str | None = None
    match: Mapping[str, JsonValue] = field(default_factory=dict)
    style: Literal["standard", "aliyun"] = "standard"
    uid: str = ""
    batch: int = 1
    is_thin: bool = False
    is_named_only: bool = False
    is_from_request: bool = False

    @property
    def metrics_label(self) -> str:
        """The name in metrics; all URLs of requests share one, because requests could name any number."""
        return "url" if self.is_from_request else self.key

    def wants(self, result: TagResult) -> bool:
        """Whether the answer goes to this endpoint, by its status, lane, metadata and the name in its request."""
        if self.is_named_only and result.callback != self.key:
            return False
        if result.status not in self.on or self.lane not in {None, result.lane}:
            return False
        metadata = result.metadata if isinstance(result.metadata, dict) else {}
        return all(name in metadata and _equals(metadata[name], wanted) for name, wanted in self.match.items())


def _equals(value: object, wanted: JsonValue) -> bool:
    # Python's True equals 1, JSON's does not.
    choices = wanted if isinstance(wanted, list) else [wanted]
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """All endpoints, and how answers go to URLs of requests."""

    named: tuple[Endpoint, ...]
    for_urls: Endpoint | None
    """The options for URLs of requests, with an empty URL; None where the file has no `urls`."""

    def find(self, key: str) -> Endpoint | None:
        """The endpoint of this name, or None."""
        return next((endpoint for endpoint in self.named if endpoint.key == key), None)

    def at(self, url: str) -> Endpoint | None:
        """The endpoint for a URL of a request, or None where the file has no `urls`."""
        if self.for_urls is None:
            return None
        options = self.for_urls
        return Endpoint(
            key=source_of(url),
            url=url,
            keys=options.keys,
            style=options.style,
            uid=options.uid,
            is_thin=options.is_thin,
            is_from_request=True,
        )


def _http_url(url: str) -> str:
    if not url.lower().startswith(("http://", "https://")) or (reason := reference_error(url)):
        raise ValueError(reason if url.lower().startswith("http") else "expected http://host/path or https://host/path")
    return url


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    secret_file: Path
    secret_old_file: Path | None = None
    style: Literal["standard", "aliyun"] = "standard"
    uid: str = Field("", max_length=64)
    thin: bool = False

    @model_validator(mode="after")
    def _check_style(self) -> Self:
        is_aliyun = self.style == "aliyun"
        if is_aliyun and self.secret_old_file:
            raise ValueError("style aliyun has one checksum, so it takes no secret_old_file")
        if is_aliyun != bool(self.uid):
            raise ValueError("expected a uid with style aliyun, and none with style standard")
        return self


class _Named(_Options):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    url: Annotated[str, AfterValidator(_http_url)]
    on: tuple[Status, ...] = Field(tuple(Status), min_length=1)
    lane: Lane | None = None
    match: dict[str, JsonValue] = Field(default_factory=dict)
    batch: int = Field(1, ge=1, le=MAX_BATCH)
    named_only: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    endpoints: tuple[_Named, ...] = Field((), max_length=MAX_ENDPOINTS)
    urls: _Options | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [endpoint.name for endpoint in self.endpoints]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected each name once, got {twice[0]!r} again")
        if not names and self.urls is None:
            raise ValueError("expected endpoints, or urls")
        return self


def read_endpoints(path: Path) -> Endpoints:
    """Read the file and the secrets that it names; relative names are in the folder of the file.

    Raises:
        EndpointsError: a file cannot be read, or a value is wrong.
    """
    try:
        file = _File.model_validate(read_yaml(path))
    except FileError as error:
        raise EndpointsError(str(error)) from None
    except ValidationError as error:
        raise EndpointsError(printable(f"{path}: {_first_error(error)}")) from None
    named = tuple(
        _endpoint(
            path,
            options,
            key=options.name,
            url=options.url,
            on=frozenset(options.on),
            lane=options.lane,
            match=options.match,
            batch=options.batch,
            is_named_only=options.named_only,
        )
        for options in file.endpoints
    )
    for_urls = _endpoint(path, file.urls, key="urls", url="", is_from_request=True) if file.urls else None
    return Endpoints(named, for_urls)


def _first_error(error: ValidationError) -> str:
    # A misspelled key gives two errors: it is unknown, and the correct one is missing.
    first = min(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    parts = [part + 1 if isinstance(part, int) else part for part in first["loc"]]
    is_entry = len(parts) > 1 and parts[0] == "endpoints"
    where = ": ".join([f"endpoint {parts[1]}", ".".join(map(str, parts[2:]))] if is_entry else map(str, parts[:1]))
    if first["type"] == "extra_forbidden":
        known = _Named if is_entry else _Options if len(parts) > 1 else _File
        return f"{where}: expected one of {', '.join(known.model_fields)}"
    # What stands at a secret's file name or in a URL may be the secret itself.
    is_open = not {"secret_file", "secret_old_file", "url"} & set(parts)
    return f"{where.removesuffix(': ') or 'file'}: {expected_and_got(first) if is_open else expectation(first)}"


def _endpoint(path: Path, options: _Options, *, key: str, url: str, **more: Any) -> Endpoint:
    read = read_seed if options.style == "aliyun" else read_secret
    keys = []
    for name in (options.secret_file, options.secret_old_file):
        if name is not None:
            try:
                keys.append(read(read_text(path.parent / name, max_bytes=MAX_SECRET_FILE_BYTES)))
            except ValueError as error:
                raise EndpointsError(f"{path}: {key}: {name}: {error}") from None
    return Endpoint(
        key=key, url=url, keys=tuple(keys), style=options.style, uid=options.uid, is_thin=options.thin, **more
    )
