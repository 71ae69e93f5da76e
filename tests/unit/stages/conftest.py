"""Fixtures of the tests of object stores."""

from __future__ import annotations

import pytest

from tests.support.servers import S3Server
from tests.support.stores import OWN_NAMES


@pytest.fixture
def own_s3_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that no store knows, and nothing from the developer's home or a cloud's metadata."""
    for name, value in OWN_NAMES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def real_store(own_s3_names: None, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The real store, with credentials that it knows."""
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3
