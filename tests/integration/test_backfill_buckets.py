"""Listings of a real bucket: odd keys, resumption after each key, and what the store refuses."""

from __future__ import annotations

import pytest

from shiwu.backfill.entries import Entry
from shiwu.backfill.sources.opening import open_source
from shiwu.parts import Objects, SourceError
from tests.support.servers import S3Server
from tests.support.waiting import wait_until

ODD = [
    "a+b.jpg",
    "c%20d %2B.jpg",
    "e f.jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "~.jpg",
    "«»&<>'\".jpg",
    "猫/狗 1.jpg",
    "?a#b.jpg",
]
"""Names that clients of stores encode, decode or refuse. SeaweedFS itself refuses empty and dotted parts."""


@pytest.fixture
def objects(s3: S3Server) -> Objects:
    """Access to the store."""
    return Objects({"SHIWU_S3_ENDPOINT_URL": s3.endpoint_url, "SHIWU_S3_REGION": s3.region})


@pytest.fixture(autouse=True)
def _credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, s3.env[name])
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


def read(objects: Objects, address: str, cursor: str = "") -> list[Entry]:
    """All entries after the cursor."""
    source = open_source(address, objects=objects)
    try:
        return list(source.entries(cursor))
    finally:
        source.close()


def test_odd_keys_are_listed_as_they_are(s3: S3Server, objects: Objects) -> None:
    """Also those that obstore refuses, from each cursor; a folder of a console is no entry."""
    for key in ODD:
        s3.put(f"odd/{key}", b"x")
    s3.put("odd/folder/", b"")
    s3.put("odd/empty.jpg", b"")
    s3.put("odd-other/a.jpg", b"x")
    found = read(objects, "s3://pictures/odd/")
    expected = sorted([*ODD, "empty.jpg"], key=str.encode)
    assert [entry.reference.removeprefix("s3://pictures/odd/") for entry in found] == expected
    assert all(entry.version and entry.modified for entry in found)
    for number, entry in enumerate(found, start=1):
        assert read(objects, "s3://pictures/odd/", entry.cursor) == found[number:]


def test_bucket_without_prefix_is_listed(s3: S3Server, objects: Objects) -> None:
    s3.put("whole/a.jpg", b"x")
    assert "s3://pictures/whole/a.jpg" in {entry.reference for entry in read(objects, "s3://pictures")}


def test_listing_of_many_pages_is_counted_beside(s3: S3Server, objects: Objects) -> None:
    for number in range(1205):
        s3.put(f"many/{number:04}.jpg", b"x")
    s3.put("many/0500\n.jpg", b"x")
    source = open_source("s3://pictures/many/", objects=objects)
    assert source.total(read=0, cursor="") in {None, 1206}
    found = [entry.reference for entry in source.entries("")]
    assert (len(found), len(set(found))) == (1206, 1206)
    assert wait_until(lambda: source.total(read=0, cursor=""), timeout_s=10) == 1206
    source.close()


def test_list_in_a_bucket_is_read(s3: S3Server, objects: Objects) -> None:
    s3.put("lists/x.jsonl", b'{"image": "s3://b/a.jpg"}\n{"image": "s3://b/b.jpg"}\n')
    found = read(objects, "s3://pictures/lists/x.jsonl")
    assert [entry.reference for entry in found] == ["s3://b/a.jpg", "s3://b/b.jpg"]
    assert read(objects, "s3://pictures/lists/x.jsonl", found[0].cursor) == found[1:]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("s3://pictures/odd", "expected a prefix that ends with a slash"),
        ("s3:///odd/", "expected s3://bucket/"),
        ("s3://no-such-bucket/a/", "NoSuchBucket|NotFound|404"),
        ("s3://pictures/lists/none.csv", "404|NoSuchKey|Not Found"),
        ("s3://pictures/lists/manifest.json", "NoSuchKey"),
    ],
)
def test_unusable_address_is_refused(objects: Objects, address: str, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        read(objects, address)
