"""Which formats an operator may name."""

from __future__ import annotations

import importlib.util

import pytest
from pydantic import ValidationError

from shiwu_worker.config import Settings


def test_formats_are_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any case; EPS, whose reader starts a program, is none, and neither is MPO, which has no reader of its own."""
    monkeypatch.setenv("SHIWU_FORMATS", "jpeg, png,TIFF")
    assert Settings().formats == ("JPEG", "PNG", "TIFF")
    for name in ("EPS", "MPO", "PDF"):
        monkeypatch.setenv("SHIWU_FORMATS", f"JPEG,{name}")
        with pytest.raises(ValidationError, match=f"expected formats of .*JPEG.* got {name}"):
            Settings()


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed here")
def test_heif_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named at the start, not at the first picture."""
    monkeypatch.setenv("SHIWU_FORMATS", "JPEG,HEIF")
    with pytest.raises(ValidationError, match=r"install shiwu\[worker,heic\]"):
        Settings()
