"""References to images: parses and checks them, and removes secrets before they are shown."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from shiwu.contract.text import control_character
from shiwu.contract.vocabulary import MAX_IMAGE_CHARS

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_PLAIN_S3: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{0,254}/[A-Za-z0-9._-][A-Za-z0-9._/-]*")
"""Matches most references; everything checked below holds for them."""
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
"""No ARN, no port and no user name."""
_NOT_IN_URLS: Final = re.compile(r"[\s\\]")
_HTTP_URL: Final = re.compile(r"https?://(?P<authority>[^/?#]*)", re.IGNORECASE)
_HOST_AND_PORT: Final = re.compile(r"(?P<host>\[(?P<six>[0-9A-Fa-f:.]+)\]|[^\[\]:%]+)(?::(?P<port>[0-9]{0,5}))?")
"""A host with `%` has a zone, or escaped letters, which only attackers write."""
_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:[/\\]*)(?P<authority>[^/\\?#]*)(?P<path>[^?#]*)", re.DOTALL
)
_HOST: Final = re.compile(r"[A-Za-z0-9._-]*")
_LOGIN: Final = re.compile(r"\b((?!s3:|file:)[a-z][a-z0-9+.-]*:/+)[^\s'\"<>]*@", re.IGNORECASE)
_VERSION: Final = "?versionId="
_HTTP: Final = frozenset({"http", "https"})
_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class S3Reference:
    """The parts of s3://bucket/key or s3://bucket/key?versionId=version."""

    bucket: str
    key: str
    version: str | None


def scheme_of(image: str) -> str:
    """The scheme of a reference in lower case, empty where it has none."""
    scheme, colon, _ = image.partition(":")
    return scheme.lower() if colon else ""


def split_s3(image: str) -> S3Reference:
    """The parts of an s3:// reference. The key is used as it is: `?`, `#` and `%` are characters of it.

    Raises:
        ValueError: there is no bucket, no key, or no version after `?versionId=`; the text says what was expected.
    """
    bucket, _, rest = image[len("s3://") :].partition("/")
    if image[:5].lower() != "s3://" or not bucket:
        raise ValueError("s3://bucket/key with a bucket and a key")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError("a bucket of letters and digits, and after the first . _ -")
    key, _, query = rest.partition(_VERSION)
    if not key.strip("/"):
        raise ValueError("s3://bucket/key with a bucket and a key")
    version, _, more = query.partition("&")
    if more and not version:
        raise ValueError("a version after ?versionId=")
    return S3Reference(bucket, key, unquote(version) or None)


def file_path(image: str) -> str:
    """The path of a file:// reference, not percent-decoded. `?` and `#` are characters of it.

    Raises:
        ValueError: it is on another host, not absolute, or has control characters behind `%`.
    """
    host, slash, path = image[len("file://") :].partition("/")
    if image[:7].lower() != "file://" or host.lower() not in {"", "localhost"} or not slash:
        raise ValueError("file:///absolute/path")
    if "%" in path and any(byte < 0x20 or byte == 0x7F for byte in unquote_to_bytes(path)):
        raise ValueError("a path without control characters")
    return f"/{path}"


def _encoding_error(image: str) -> str | None:
    if not image.isascii() and _SURROGATE.search(image):
        return "expected text that UTF-8 can write, got a lone surrogate"
    if found := control_character(image):
        return f"expected no control, direction or zero-width characters, got {found}"
    return None


def reference_error(image: str) -> str | None:
    """Why `image` is not a valid reference, or None. Checks the text only, without any network access."""
    if len(image) > MAX_IMAGE_CHARS:
        return f"expected at most {MAX_IMAGE_CHARS} characters, got {len(image)}"
    if _PLAIN_S3.fullmatch(image):
        return None
    if error := _encoding_error(image):
        return error
    scheme = scheme_of(image)
    try:
        if scheme == "s3":
            split_s3(image)
        elif scheme == "file":
            file_path(image)
        elif scheme in _HTTP:
            return url_error(image)
        else:
            raise ValueError("s3://bucket/key, https://host/path, http:// or file://")
    except ValueError as error:
        return f"expected {error}, got {_hint(image)}"
    return None


def url_error(url: str) -> str | None:
    """Why `url` is no http(s) URL that workers ask for, or None. Producers and workers check it by this rule.

    It is stricter than parsers, which read odd URLs in different ways. A host in other letters than ASCII may still be
    no name that can exist; the rules for those change with Unicode, so a worker finds no such host.
    """
    if error := _encoding_error(url):
        return error
    if _NOT_IN_URLS.search(url):
        return "expected a URL without white space and backslashes; write %20 for a space"
    found = _HTTP_URL.match(url)
    if found is not None and "@" in found["authority"]:
        return "expected a URL without user name and password"
    if found is None or not _is_host_and_port(found["authority"]):
        scheme = scheme_of(url) if scheme_of(url) in _HTTP else "https"
        form = f"{scheme}://host[:port]/path with a host name and a port from 1 to 65535"
        return f"expected {form}, got {_hint(url)}"
    return None


def _is_host_and_port(authority: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(authority)
    if found is None or not 1 <= int(found["port"] or 80) <= 65535:
        return False
    if found["six"] is not None:
        try:
            IPv6Address(found["six"])
        except ValueError:
            return False
    host = found["host"]
    # Look-alikes of ASCII letters and of the dot, such as full-width ones: parsers differ in what they make of them.
    return host.isascii() or (unicodedata.is_normalized("NFKC", host) and "\u3002" not in host)


def _hint(image: str) -> str:
    """What an error may quote of an invalid reference: nothing that may be a password or a signature."""
    scheme = scheme_of(image)
    found = _URL.match(image)
    # A password without its "@", or with another character in its place, looks like a port.
    is_odd = scheme in _HTTP and (found is None or not _HOST.fullmatch(found["authority"]))
    if "@" in image or is_odd:
        return f"'{scheme}://…'" if scheme in {*_HTTP, "s3", "file"} else "a text with '@'"
    return repr(re.split(r"[?#]", image, maxsplit=1)[0][:_SHOWN_CHARS])


def source_of(image: str) -> str:
    """The host with its port, the bucket, or the scheme, as in `https://host:443`, `s3://bucket` and `file:`.

    Without path, query and user name. Never raises: an unreadable reference gives its scheme only.
    """
    if image.startswith("s3://"):
        end = image.find("/", 5)
        return image[:end] if end > 0 else image
    scheme = scheme_of(image)
    if scheme == "s3":
        return f"s3://{image[5:].partition('/')[0]}"
    if scheme in _HTTP:
        with contextlib.suppress(ValueError):
            parts = urlsplit(image)
            return f"{scheme}://{(parts.hostname or '').rstrip('.')}:{parts.port or (443 if scheme == 'https' else 80)}"
    return f"{scheme}:"


def without_query(image: str) -> str:
    """The reference as logs and answers show it: http(s) URLs lose query, fragment, user name and password.

    Valid references of other schemes are unchanged: there `?`, `#` and `@` belong to the name. Of a text that cannot be
    read as a reference only the scheme is shown, because any part of it may be a password.
    """
    if _PLAIN_S3.fullmatch(image):
        return image
    scheme = scheme_of(image)
    if scheme in _HTTP:
        return _shown_url(image) or f"{scheme}://…"
    if reference_error(image) is None:
        return image
    return f"{scheme}://…" if scheme in {"s3", "file"} else "…"


def _shown_url(image: str) -> str | None:
    """An http(s) URL without query, fragment and user, or None where it is unclear which part is the host."""
    found = _URL.match(image)
    try:
        parts = urlsplit(image)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        return None
    if found is None or not has_host or found["authority"] != parts.netloc:
        return None
    return found["scheme"] + found["authority"].rpartition("@")[2] + found["path"]


def without_logins(text: str) -> str:
    """A text of the configuration or of a library, whose URLs lose their user names and passwords.

    All from the scheme to the last `@` of a URL goes, because a malformed URL may have `/` or `@` in its password. The
    names of `s3://` and `file://` references may have an `@`, so they are unchanged.
    """
    return _LOGIN.sub(r"\1", text) if "@" in text else text
