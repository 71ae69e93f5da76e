"""ETags: a source that has the same file as before need not send it, and is asked with all checks nevertheless."""

from __future__ import annotations

import pytest

from shiwu.contract import ErrorCode
from shiwu_worker.errors import JobError
from shiwu_worker.policy.access_rules import AccessRules
from shiwu_worker.policy.limits import S3Client
from shiwu_worker.stages.fetch.validators import OWN_STORE, Validator, place_of, validator_of
from tests.support.fetchers import make_fetcher
from tests.support.picture_server import PictureServer, Reply
from tests.support.servers import S3Server
from tests.support.stores import each_client
from tests.support.stores import make_fetcher as make_store_fetcher

BODY = b"x" * 5000
ETAG = '"v1"'


@pytest.mark.parametrize(
    ("etag", "is_used"),
    [
        ('"a"', True),
        (' "a" ', True),
        ('"' + "a" * 198 + '"', True),
        ('"' + "a" * 199 + '"', False),
        ('W/"a"', False),
        ('""', False),
        ("a", False),
        ('"a\n"', False),
        ('"\xe9"', False),
        ('"a"b"', False),
        (None, False),
    ],
)
def test_only_strong_etags_are_used(etag: str | None, *, is_used: bool) -> None:
    """A weak one may stand for other bytes, and nothing odd is sent back to a server."""
    found = validator_of(etag, place_of("https://h/p"))
    assert (found is not None) is is_used
    assert found is None or found.is_valid


def test_file_that_is_not_modified_is_not_sent(http_server: PictureServer) -> None:
    """The server is asked each time; other bytes under the same name come with their own ETag."""
    url = http_server.serve("/a", Reply(body=BODY).tagged(ETAG))
    fetcher = make_fetcher()
    first = fetcher.fetch_if_changed(url, None)
    assert first is not None
    assert (first.data, first.validator) == (BODY, Validator(ETAG, place_of(url)))
    for hits in (2, 3):
        assert fetcher.fetch_if_changed(url, first.validator) is None
        assert (http_server.hits["/a"], http_server.unmodified["/a"]) == (hits, hits - 1)
    http_server.serve("/a", Reply(body=b"new").tagged('"v2"'))
    changed = fetcher.fetch_if_changed(url, first.validator)
    assert changed is not None
    assert (changed.data, changed.validator) == (b"new", Validator('"v2"', place_of(url)))


def test_etag_goes_only_to_the_address_that_gave_it(http_server: PictureServer) -> None:
    """A redirect to another file gets none, so its 304 cannot stand for the first file."""
    first_url = http_server.serve("/first", Reply(body=BODY).tagged(ETAG))
    other_url = http_server.serve("/other", Reply(body=b"other").tagged(ETAG))
    moved = http_server.serve("/moved", Reply.redirect(first_url))
    fetcher = make_fetcher()
    first = fetcher.fetch_if_changed(moved, None)
    assert first is not None
    assert first.validator == Validator(ETAG, place_of(first_url))
    assert fetcher.fetch_if_changed(moved, first.validator) is None
    http_server.serve("/moved", Reply.redirect(other_url))
    other = fetcher.fetch_if_changed(moved, first.validator)
    assert other is not None
    assert other.data == b"other"
    assert "If-None-Match" not in http_server.headers["/other"]
    assert "If-None-Match" not in http_server.headers["/moved"]


def test_304_that_was_not_asked_for_is_an_error(http_server: PictureServer) -> None:
    """Also from a redirect, to which no ETag was sent."""
    url = http_server.serve("/a", Reply(status=304))
    moved = http_server.serve("/moved", Reply.redirect(url))
    for reference in (url, moved):
        with pytest.raises(JobError) as caught:
            make_fetcher().fetch_if_changed(reference, Validator(ETAG, place_of(moved)))
        assert caught.value.code is ErrorCode.SOURCE_ERROR


def test_access_rules_hold_for_known_files(http_server: PictureServer) -> None:
    """A host that is denied is not asked, and a file that is gone or forbidden now is no known file."""
    url = http_server.serve("/a", Reply(body=BODY).tagged(ETAG))
    validator = Validator(ETAG, place_of(url))
    denying = make_fetcher(access=AccessRules(allow_hosts=("127.0.0.1",), deny_hosts=("127.0.0.1",)))
    with pytest.raises(JobError):
        denying.fetch_if_changed(url, validator)
    assert http_server.hits["/a"] == 0
    for status, code in ((403, ErrorCode.SOURCE_FORBIDDEN), (404, ErrorCode.SOURCE_NOT_FOUND)):
        http_server.serve("/a", Reply.error(status))
        with pytest.raises(JobError) as caught:
            make_fetcher().fetch_if_changed(url, validator)
        assert caught.value.code is code


@each_client
def test_store_need_not_send_a_known_object(s3: S3Server, monkeypatch: pytest.MonkeyPatch, client: S3Client) -> None:
    """A real store answers 304 to its own ETag, and sends an object that was written anew, or is gone."""
    for name, text in s3.env.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, text)
    reference = s3.put(f"known-{client}", BODY)
    fetcher = make_store_fetcher(client, s3.endpoint_url)
    first = fetcher.fetch_if_changed(reference, None)
    assert first is not None
    assert first.data == BODY
    assert first.validator is not None
    assert first.validator.place == OWN_STORE
    assert fetcher.fetch_if_changed(reference, first.validator) is None
    s3.put(f"known-{client}", b"new")
    changed = fetcher.fetch_if_changed(reference, first.validator)
    assert changed is not None
    assert changed.data == b"new"
    assert changed.validator != first.validator
    with pytest.raises(JobError) as caught:
        fetcher.fetch_if_changed(reference.replace("known-", "unknown-"), changed.validator)
    assert caught.value.code is ErrorCode.SOURCE_NOT_FOUND
