"""The file of endpoints, its errors, and which answers an endpoint wants."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from shiwu.client.results import TagResult
from shiwu.contract import Lane, Status
from shiwu.hooks.endpoints import Endpoint, EndpointsError, read_endpoints

KEY = bytes(range(24))
FULL = """
version: 1
endpoints:
  - name: orders
    url: https://example.org/hook?token=1
    secret_file: secret
    secret_old_file: old
    on: [tagged, failed]
    lane: interactive
    match: {team: [a, b], kind: 1}
    batch: 100
    thin: true
    named_only: true
  - {name: 审核, url: "http://10.0.0.1:81/", secret_file: seed, style: aliyun, uid: "1234"}
urls: {secret_file: secret}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with secrets."""
    (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(KEY).decode()}\n")
    (tmp_path / "old").write_text(f"whsec_{base64.b64encode(KEY[::-1]).decode()}")
    (tmp_path / "seed").write_text("a-seed-of-aliyun\n")
    (tmp_path / "weak").write_text("whsec_c2hvcnQ=")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    """The file of endpoints with this text."""
    path = folder / "endpoints.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_option_is_read(folder: Path) -> None:
    """`on` is a key and no truth value, and secrets are next to the file."""
    found = read_endpoints(write(folder, FULL))
    assert found.find("orders") == Endpoint(
        key="orders",
        url="https://example.org/hook?token=1",
        keys=(KEY, KEY[::-1]),
        on=frozenset({Status.TAGGED, Status.FAILED}),
        lane=Lane.INTERACTIVE,
        match={"team": ["a", "b"], "kind": 1},
        batch=100,
        is_thin=True,
        is_named_only=True,
    )
    aliyun = found.find("审核")
    assert aliyun is not None
    assert (aliyun.style, aliyun.uid, aliyun.keys, aliyun.batch) == ("aliyun", "1234", (b"a-seed-of-aliyun",), 1)
    assert "keys" not in repr(found)
    url = found.at("https://Example.org/x?a=1")
    assert url is not None
    assert (url.key, url.keys, url.metrics_label) == ("https://example.org:443", (KEY,), "url")
    assert found.find("other") is None


ENTRY = "name: a, url: 'https://h/', secret_file: secret"
WRONG = {
    "empty": ("", "file"),
    "yaml": ("endpoints: [", "expected YAML"),
    "none": ("version: 1", "expected endpoints, or urls"),
    "twice": (f"endpoints: [{{{ENTRY}}}, {{{ENTRY}}}]", "expected each name once, got 'a' again"),
    "unknown": (f"endpoints: [{{{ENTRY}, secrets: x}}]", "endpoint 1: secrets: expected one of secret_file, "),
    "status": (f"endpoints: [{{{ENTRY}, on: [done]}}]", "endpoint 1: on.1: expected 'tagged', "),
    "batch": (f"endpoints: [{{{ENTRY}, batch: 101}}]", "endpoint 1: batch: expected at most 100, got 101"),
    "name": (
        "endpoints: [{name: 'a b', url: 'https://h/', secret_file: secret}]",
        "endpoint 1: name: expected a name of 1 to 64 letters",
    ),
    "section": (f"endpoint: [{{{ENTRY}}}]", "endpoint: expected one of version, endpoints, urls"),
    "misspelt": (
        "endpoints: [{name: a, url: 'https://h/', secrets_file: pw}]",
        "endpoint 1: secrets_file: expected one",
    ),
    "pasted": ("endpoints: [{name: a, url: 'https://h/', secret_file: [pw]}]", "secret_file: expected a text"),
    "second": (f"endpoints: [{{{ENTRY}}}, {{{ENTRY}, thin: maybe}}]", "endpoint 2: thin: expected true or false, got"),
    "urls": ("urls: {secret_file: secret, x: 1}", "urls: expected one of secret_file, "),
    "scheme": ("endpoints: [{name: a, url: 'ftp://h/', secret_file: secret}]", "expected http://host/path or"),
    "login": ("endpoints: [{name: a, url: 'https://u:pw@h/', secret_file: secret}]", "without user name"),
    "weak": ("endpoints: [{name: a, url: 'https://h/', secret_file: weak}]", "a: weak: expected whsec_"),
    "missing": ("endpoints: [{name: a, url: 'https://h/', secret_file: gone}]", "expected a readable file"),
    "uid": (f"endpoints: [{{{ENTRY}, style: aliyun}}]", "expected a uid with style aliyun"),
    "old": (f"endpoints: [{{{ENTRY}, style: aliyun, uid: x, secret_old_file: old}}]", "takes no secret_old_file"),
    "no-uid": (f"endpoints: [{{{ENTRY}, uid: x}}]", "none with style standard"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused_with_its_place(folder: Path, case: str) -> None:
    """And without secrets."""
    text, reason = WRONG[case]
    with pytest.raises(EndpointsError) as caught:
        read_endpoints(write(folder, text))
    assert reason in str(caught.value)
    assert not {"pw", "c2hvcnQ"} & set(str(caught.value).replace(":", " ").split())


def answer(**fields: Any) -> TagResult:
    """An answer with these fields."""
    return TagResult(**({"id": "k", "status": Status.TAGGED, "lane": Lane.BULK} | fields))


@pytest.mark.parametrize(
    ("options", "fields", "is_wanted"),
    [
        ({}, {}, True),
        ({"on": frozenset({"failed"})}, {}, False),
        ({"on": frozenset({"failed"})}, {"status": Status.FAILED}, True),
        ({"lane": "interactive"}, {}, False),
        ({"lane": "bulk"}, {}, True),
        ({"match": {"team": "a"}}, {"metadata": {"team": "a", "x": 1}}, True),
        ({"match": {"team": ["a", "b"]}}, {"metadata": {"team": "b"}}, True),
        ({"match": {"team": "a"}}, {"metadata": {"team": "b"}}, False),
        ({"match": {"team": "a"}}, {"metadata": ["team"]}, False),
        ({"match": {"team": None}}, {"metadata": {}}, False),
        ({"match": {"team": 1}}, {"metadata": {"team": True}}, False),
        ({"is_named_only": True}, {}, False),
        ({"is_named_only": True}, {"callback": "a"}, True),
        ({"is_named_only": True}, {"callback": "b"}, False),
        ({}, {"callback": "b"}, True),
    ],
)
def test_endpoint_wants_what_its_options_say(options: dict[str, Any], fields: dict[str, Any], is_wanted: bool) -> None:
    """By status, lane, metadata and the name in the request."""
    assert Endpoint(key="a", url="https://h/", keys=(KEY,), **options).wants(answer(**fields)) is is_wanted
