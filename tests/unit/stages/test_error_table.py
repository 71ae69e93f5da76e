"""The table of replies and errors: every row is fed to the code that reads it, and what no row names is retried."""

from __future__ import annotations

import errno
import importlib
import os
import re
import threading
from importlib.metadata import version
from itertools import chain
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import Mock

import numpy as np
import pytest
from botocore.retries.standard import ThrottledRetryableChecker
from obstore.exceptions import GenericError
from PIL import Image

from shiwu.contract import CODES, ErrorCode, Stage, log_level_of
from shiwu_worker.config.settings import Settings
from shiwu_worker.config.views import s3_options
from shiwu_worker.errors import JobError, Rejected, Unavailable
from shiwu_worker.loaders.process import LoaderProcess
from shiwu_worker.loaders.protocol import LoaderOptions, LoadFailed, LoadTask
from shiwu_worker.loaders.sandbox import DecoderDefect, _decode
from shiwu_worker.loaders.sandbox_protocol import DecoderFailed
from shiwu_worker.loaders.shared_memory import KnownImages
from shiwu_worker.policy.limits import DecodeLimits, S3Options
from shiwu_worker.service.factories import loader_options
from shiwu_worker.stages.decode.image_spec import ImageSpec
from shiwu_worker.stages.fetch.error_table import (
    TABLE,
    UNKNOWN,
    Kind,
    Row,
    exception_row,
    file_row,
    obstore_row,
    s3_row,
)
from shiwu_worker.stages.fetch.fetch_errors import http_error
from shiwu_worker.stages.fetch.s3.base import ObjectStore, StoreError, s3_error
from shiwu_worker.stages.fetch.s3.boto import as_store_errors
from shiwu_worker.stages.fetch.s3.obstore import _store_error
from shiwu_worker.stages.fetch.validators import FetchedFile
from tests.support.fetchers import make_fetcher as make_web_fetcher
from tests.support.picture_server import PictureServer, Reply
from tests.support.processes import ROOT
from tests.support.stores import CLIENTS, OWN_NAMES, make_fetcher, make_store, read

BODY: Final = b"x" * 100
STATUS_OF_CODE: Final = {"NoSuchKey": 404, "NoSuchBucket": 404, "NoSuchVersion": 404, "SlowDown": 503, "Redirect": 307}
"""Other codes are served with 400, which by itself means nothing that the worker knows."""


def keys(kind: Kind) -> list[Any]:
    """Each key of a table with its row, as parameters of a test."""
    return [pytest.param(key, one, id=key) for one in TABLE[kind] for key in one.keys]


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that no store knows; one try for each fetch."""
    for name, value in OWN_NAMES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("shiwu_worker.stages.fetch.fetcher.MAX_QUICK_TRIES", 1)


def agrees(error: JobError, one: Row) -> bool:
    """Whether the error of the job is what the row says."""
    kind = Rejected if one.is_final else Unavailable
    return error.code is one.code and isinstance(error, kind) and error.stage is Stage.FETCH


# -------------------------------------------------------------------------------- the table itself
def test_every_key_is_in_one_row() -> None:
    """A key twice would mean what the later row says; a status that is no number would mean nothing."""
    for kind, rows in TABLE.items():
        found = list(chain.from_iterable(one.keys for one in rows))
        assert len(found) == len(set(found)), kind
        if kind in {Kind.HTTP_STATUS, Kind.S3_STATUS}:
            assert all(key in {"3xx", "5xx"} or 100 <= int(key) < 600 for key in found)


def test_rows_agree_with_the_table_of_codes() -> None:
    """Fault and level are the code's; only one row is final although its code is retried."""
    for one in chain.from_iterable(TABLE.values()):
        info = CODES[one.error_code]
        assert (one.fault, one.log_level) == (info.fault, info.log_level)
    assert (UNKNOWN.code, UNKNOWN.is_final, UNKNOWN.log_level) == (ErrorCode.SOURCE_ERROR, False, "error")


def test_only_explicit_codes_mean_not_found() -> None:
    """404, 410 and S3's three codes; a marker of a deletion where a version is asked for; a file that is not there."""
    found = {
        key for rows in TABLE.values() for one in rows if one.code is ErrorCode.SOURCE_NOT_FOUND for key in one.keys
    }
    assert found == {
        *("404", "410", "NoSuchKey", "NoSuchBucket", "NoSuchVersion"),
        *("MethodNotAllowed", "ENOENT", "ENOTDIR"),
    }


def test_all_throttling_codes_of_botocore_are_known() -> None:
    """What botocore itself would slow down for."""
    for code in ThrottledRetryableChecker._THROTTLED_ERROR_CODES:
        assert s3_row(code, 400, has_version=False).code is ErrorCode.SOURCE_THROTTLED, code


# -------------------------------------------------------------------------------- S3, by both clients
def refusals(
    server: PictureServer, stores: list[ObjectStore], status: int, body: bytes, *, version: str | None = None
) -> list[JobError]:
    """What each client makes of this reply."""
    server.serve("/pictures/a", Reply(status=status, body=body))
    found = []
    for store in stores:
        with pytest.raises(StoreError) as caught:
            read(store, "a", version=version)
        found.append(s3_error(caught.value, "s3://pictures/a"))
    # obstore does not tell the number of a redirect.
    words = {(str(one), one.detail) if status >= 400 else () for one in found}
    assert len(words) == len({(type(one), one.code) for one in found}) == 1, found
    return found


@pytest.fixture
def stores(http_server: PictureServer) -> list[ObjectStore]:
    """Both clients of one store that says what it is told to."""
    return [make_store(client, http_server.url("")) for client in CLIENTS]


def said(code: str) -> bytes:
    """An error of S3."""
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>m</Message></Error>".encode()


@pytest.mark.parametrize("kind", [Kind.S3_CODE, Kind.S3_CODE_WITH_VERSION])
def test_every_s3_code_gives_its_error(http_server: PictureServer, stores: list[ObjectStore], kind: Kind) -> None:
    """By both clients alike."""
    version = "v" if kind is Kind.S3_CODE_WITH_VERSION else None
    for one in TABLE[kind]:
        for code in one.keys:
            status = STATUS_OF_CODE.get(code, 400)
            if status in {301, 307}:
                continue  # with a Location or without one, that is a status: below
            for error in refusals(http_server, stores, status, said(code), version=version):
                assert agrees(error, one), (code, error)


def test_every_status_of_a_store_gives_its_error(http_server: PictureServer, stores: list[ObjectStore]) -> None:
    """Without a body, with a page of HTML, and with a code that no table has."""
    for status in (300, 301, 304, 307, *range(400, 432), 451, *range(500, 512), 529):
        expected = s3_row("", status, has_version=False)
        for body in (b"", b"<html><body>no</body></html>", said("NewCode")) if status >= 400 else (b"",):
            for error in refusals(http_server, stores, status, body):
                assert agrees(error, expected), (status, body, error)


@pytest.mark.parametrize("code", ["NewCode", "InvalidRequest", "MethodNotAllowed", "InvalidArgument", "x" * 100])
def test_unknown_s3_code_is_retried(http_server: PictureServer, stores: list[ObjectStore], code: str) -> None:
    """It is the service's own fault, and the log gets it."""
    for error in refusals(http_server, stores, 400, said(code)):
        assert agrees(error, UNKNOWN)
        assert error.detail is not None
        assert "S3 answered" in error.detail


# -------------------------------------------------------------------------------- HTTP
@pytest.mark.parametrize("hundred", [2, 3, 4, 5])
def test_every_http_status_gives_its_error(http_server: PictureServer, hundred: int) -> None:
    """By its own row, else by its hundred, else unknown."""
    rows = {key: one for one in TABLE[Kind.HTTP_STATUS] for key in one.keys}
    web = make_web_fetcher()
    for status in set(range(100 * hundred, 100 * hundred + 100)) - {200, 203, 206}:
        expected = rows.get(str(status)) or rows.get(f"{hundred}xx") or UNKNOWN
        url = http_server.serve("/a", Reply(status=status, body=b"" if status in {204, 205, 304} else BODY))
        with pytest.raises(JobError) as caught:
            web.fetch(url)
        assert agrees(caught.value, expected), caught.value
        assert f"HTTP {status}" in str(caught.value)


# -------------------------------------------------------------------------------- exceptions
def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    [found] = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    return str(found)


@pytest.mark.parametrize(("name", "one"), keys(Kind.EXCEPTION))
def test_every_exception_exists_and_gives_its_error(name: str, one: Row) -> None:
    """A name that no library has would be a row without effect. Classes below it mean the same."""
    module, _, attribute = name.rpartition(".")
    cls = getattr(importlib.import_module(module), attribute, None)
    if cls is None and module == "botocore.exceptions" and version("botocore") != pinned("botocore"):
        pytest.skip(f"botocore {version('botocore')} has no {attribute}")
    assert cls is not None
    error = cls.__new__(cls)
    assert exception_row(error) is one
    if module == "botocore.exceptions":
        with pytest.raises(StoreError) as caught, as_store_errors():
            raise error
        assert agrees(s3_error(caught.value, "s3://b/k"), one)
    elif module != "shiwu_worker.errors":
        assert agrees(http_error(error, "https://h/p"), one)


@pytest.mark.parametrize("error", [KeyError("v"), RuntimeError("x"), MemoryError(), ValueError("odd")], ids=repr)
def test_unknown_exception_is_retried_and_logged(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It never says something about the image; the log gets its class and place, and no query."""

    def fail(*_: object, **__: object) -> None:
        raise error

    fetcher = make_fetcher("boto3", "http://127.0.0.1:1")
    monkeypatch.setattr(fetcher._store, "open", fail)
    with pytest.raises(JobError) as caught:
        fetcher.fetch("s3://b/k")
    assert agrees(caught.value, UNKNOWN)
    assert caught.value.detail is not None
    assert f"{type(error).__name__}: " in caught.value.detail
    assert "in fail" not in str(caught.value)
    assert "test_error_table.py" in caught.value.detail


def test_logged_cause_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of libraries hold whole URLs."""

    def fail(*_: object, **__: object) -> None:
        raise KeyError("https://user:hush@h/p?X-Amz-Signature=hush")

    fetcher = make_web_fetcher()
    monkeypatch.setattr(fetcher._http_client, "open", fail)
    with pytest.raises(JobError) as caught:
        fetcher.fetch("https://h/p?X-Amz-Signature=hush")
    assert "hush" not in f"{caught.value} {caught.value.detail}"


@pytest.mark.parametrize(("kind", "one"), keys(Kind.OBSTORE))
def test_every_kind_of_obstore_gives_its_error(kind: str, one: Row) -> None:
    """As the text of its errors tells it."""
    text = f"source: {kind} {{" if kind == "Header" else f"HttpError {{\n kind: {kind},"
    assert obstore_row(kind) is one
    assert agrees(s3_error(_store_error(GenericError(text), "k", has_version=False), "s3://b/k"), one)


def test_unknown_error_of_obstore_is_retried() -> None:
    """No reply and no kind: the client's own defect."""
    assert agrees(s3_error(_store_error(GenericError("odd"), "k", has_version=False), "s3://b/k"), UNKNOWN)


def test_every_errno_of_a_file_gives_its_error() -> None:
    """Those that are named, and all others."""
    named = {key: one for one in TABLE[Kind.FILE] for key in one.keys}
    for number, name in errno.errorcode.items():
        assert file_row(OSError(number, os.strerror(number))) is named.get(name, named["any other"])
    assert all(key in errno.errorcode.values() for key in named if key != "any other")


# -------------------------------------------------------------------------------- behind the fetch
PNG = b"\x89PNG\r\n\x1a\n"
LIMITS = DecodeLimits(max_pixels=1, max_side=1, formats=("PNG",))


def unforeseen(*_: object, **__: object) -> Any:
    """A part that fails in a way that no code foresees."""
    raise RuntimeError("unforeseen")


def fetched(*_: Any) -> FetchedFile:
    """A fetch that brings an image."""
    return FetchedFile(PNG, None)


def failure_of(*, fetch: Any, decode: Any) -> LoadFailed:
    """What a loader with this fetcher and this sandbox sends of an image."""
    sent: list[Any] = []
    loader: Any = LoaderProcess.__new__(LoaderProcess)
    loader._fetcher, loader._sandbox = SimpleNamespace(fetch_if_changed=fetch), SimpleNamespace(decode=decode)
    loader._decode_limits, loader._shares_images, loader._send = LIMITS, False, sent.append
    loader._load(LoadTask(ticket=1, slot=0, image="https://h/p?hush"), 0)
    [result] = sent
    assert isinstance(result, LoadFailed)
    return result


def test_unknown_decoder_error_is_a_fault_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hostile bytes make a codec raise is told before; anything else says nothing about the image."""
    monkeypatch.setattr("shiwu_worker.loaders.sandbox.decode", unforeseen)
    options: Any = SimpleNamespace(spec=None, decode=DecodeLimits(max_pixels=1, max_side=1, formats=()), is_exact=False)
    found = _decode(b"x", 1, np.zeros((1, 1, 3), np.uint8), options)
    assert isinstance(found, DecoderFailed)
    error = failure_of(fetch=fetched, decode=Mock(side_effect=DecoderDefect(found.message))).error
    assert (error.code, error.retryable) == (ErrorCode.INTERNAL_ERROR, True)


@pytest.mark.parametrize("stage", [Stage.FETCH, Stage.DECODE])
def test_unknown_loader_error_is_a_fault_of_the_worker(stage: Stage) -> None:
    """Whatever part of it failed."""
    result = failure_of(fetch=unforeseen if stage is Stage.FETCH else fetched, decode=unforeseen)
    assert (result.error.code, result.error.stage, result.is_final) == (ErrorCode.INTERNAL_ERROR, stage, False)
    assert log_level_of(result.error.code) == "error"


def test_settings_of_fetch_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the frame that a loader process gets."""
    for name, value in {
        "SHIWU_LOADER_THREADS": "1",
        "SHIWU_MAX_REDIRECTS": "7",
        "SHIWU_RETRY_AFTER_LONGEST_S": "40",
        "SHIWU_USER_AGENT": "tagger/1",
        "SHIWU_S3_ANONYMOUS": "1",
        "SHIWU_S3_REQUESTER_PAYS": "1",
        "SHIWU_S3_ENDPOINT_URL": "http://h:9000",
    }.items():
        monkeypatch.setenv(name, value)
    spec = ImageSpec(8, 8, "squash", None, Image.Resampling.BICUBIC, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    frame = loader_options(Settings(), spec).model_dump_json()
    waits: Any = SimpleNamespace(wait=threading.Event().wait)
    fetcher: Any = LoaderProcess(
        LoaderOptions.model_validate_json(frame),
        waits,
        waits,
        pixels=np.zeros((1, 8, 8, 3), np.uint8),
        known_images=KnownImages(np.zeros(0, np.uint64)),
    )._fetcher
    assert (fetcher._limits.max_redirects, fetcher._limits.longest_pause_s) == (7, 40.0)
    assert fetcher._http_client._headers["User-Agent"] == "tagger/1"
    expected = S3Options("http://h:9000", None, is_anonymous=True, requester_pays=True, user_agent="tagger/1")
    assert fetcher._store._options == expected == s3_options(Settings())
