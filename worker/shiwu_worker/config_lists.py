"""Settings that are more than a word or a number: their types, and how they are read from text."""

from __future__ import annotations

import ipaddress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_settings import NoDecode

from shiwu.contract import RETRIABLE, ErrorCode
from shiwu_worker.reach import checked, read_host, read_nat64


def _has_otel(value: bool) -> bool:
    try:
        is_there = not value or find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # of a package above it
        is_there = False
    if not is_there:
        raise ValueError("traces need OpenTelemetry's SDK and its exporter: install shiwu[worker,otel]")
    return value


def _has_client(value: str) -> str:
    if value == "obstore" and find_spec("obstore") is None:
        raise ValueError("obstore is not installed: install shiwu[worker,obstore], or take boto3")
    return value


FORMATS = {"JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "HEIF"}
"""Formats that the operator may allow, by Pillow's names."""
FORMAT_ALIASES = {"JPG": "JPEG", "JPE": "JPEG", "JFIF": "JPEG", "TIF": "TIFF", "HEIC": "HEIF", "APNG": "PNG"}
"""Endings of file names that people write for them."""


def _known_formats(value: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(FORMAT_ALIASES.get(name.upper(), name.upper()) for name in value))
    if unknown := sorted(set(names) - FORMATS):
        raise ValueError(f"expected formats of {', '.join(sorted(FORMATS))}, got {', '.join(unknown)[:80]}")
    if "HEIF" in names and find_spec("pillow_heif") is None:
        raise ValueError("HEIF (HEIC) needs pillow-heif: install shiwu[worker,heic]")
    return names


Names = Annotated[tuple[str, ...], NoDecode]
Formats = Annotated[tuple[str, ...], NoDecode, AfterValidator(_known_formats)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(checked(read_host))], ...], NoDecode]
Networks = Annotated[tuple[Annotated[str, AfterValidator(checked(ipaddress.ip_network))], ...], NoDecode]
Prefixes = Annotated[tuple[Annotated[str, AfterValidator(checked(read_nat64))], ...], NoDecode]
Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], NoDecode]
Paths = Annotated[tuple[Path, ...], NoDecode]
S3Client = Annotated[Literal["boto3", "obstore"], AfterValidator(_has_client)]
Traces = Annotated[bool, AfterValidator(_has_otel)]
Retries = Annotated[dict[ErrorCode, tuple[int, float, float]], NoDecode]


def split(text: str) -> list[str]:
    """What stands between commas, without spaces around it."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_retry(part: str) -> tuple[ErrorCode, tuple[int, float, float]]:
    """One class of error, `code=tries:first_s:longest_s`.

    Raises:
        ValueError: for another form, a code that is never tried again, or numbers out of order.
    """
    code, _, numbers = part.strip().partition("=")
    try:
        attempts, first_s, longest_s = numbers.split(":")
        policy = (int(attempts), float(first_s), float(longest_s))
        known = ErrorCode(code) in RETRIABLE
    except ValueError:
        raise ValueError(f"expected code=tries:first_s:longest_s, got {part.strip()!r:.80}") from None
    if not known or policy[0] < 1 or not 0 < policy[1] <= policy[2]:
        allowed = ", ".join(sorted(RETRIABLE))
        raise ValueError(
            f"expected one of {allowed} with 1 or more tries and 0 < first_s <= longest_s, got {part!r:.80}"
        )
    return ErrorCode(code), policy
