"""References to pictures: what is one, and how it is shown."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from shiwu.contract.words import MAX_IMAGE_CHARS

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def reference_error(image: str) -> str | None:
    """Why `image` is no usable reference, or None. Looks at the text only, never at the network."""
    if len(image) > MAX_IMAGE_CHARS:
        return f"expected at most {MAX_IMAGE_CHARS} characters, got {len(image)}"
    if _CONTROL.search(image):
        return "expected no control characters"
    try:
        parts = urlsplit(image)
        if parts.scheme == "s3":
            ok, expected = (
                bool(parts.netloc and parts.path.strip("/")),
                "s3://bucket/key with a bucket and a key",
            )
        elif parts.scheme in {"http", "https"}:
            if "@" in parts.netloc:
                return "expected a URL without user name and password"
            ok, expected = (
                bool(parts.hostname) and parts.port != 0,
                f"{parts.scheme}://host/path with a host name",
            )
        elif parts.scheme == "file":
            ok, expected = (
                parts.netloc in {"", "localhost"} and parts.path.startswith("/"),
                "file:///absolute/path",
            )
        else:
            ok, expected = False, "s3://bucket/key, https://host/path, http:// or file://"
    except ValueError as error:
        ok, expected = False, f"a URL ({error})"
    return None if ok else f"expected {expected}, got {without_query(image)[:200]!r}"


def without_query(image: str) -> str:
    """The reference fit for logs and answers: no query, no fragment, no user info (they may hold signatures)."""
    if not ("?" in image or "#" in image or "@" in image):
        return image
    try:
        parts = urlsplit(image)
    except ValueError:
        return image.partition("?")[0]
    netloc = parts.netloc.rpartition("@")[2]
    return parts._replace(query="", fragment="", netloc=netloc).geturl()
