"""Types of settings that are more than a word or a number, and how they are read from text."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from shiwu.contract import RETRIABLE, ErrorCode, Lane, printable
from shiwu.network.address_rules import checked, read_host, read_nat64, read_network
from shiwu_worker.stages.decode.image_formats import READABLE


def _has_otel(value: bool) -> bool:
    try:
        available = not value or find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a parent package is missing
        available = False
    if not available:
        raise ValueError(
            "traces need OpenTelemetry with its exporter: run pip install '.[worker,otel]' in a clone of shiwu"
        )
    return value


def _has_client(value: str) -> str:
    if value == "obstore" and find_spec("obstore") is None:
        raise ValueError(
            "obstore is not installed: run pip install '.[worker,obstore]' in a clone of shiwu, or use boto3"
        )
    return value


FUSIONS = ("patches", "qkv", "attention", "norms")
"""Steps that make the image tower faster."""


def _known_fusions(value: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.lower() for name in value))
    if names == ("auto",):
        return names
    if unknown := sorted(set(names) - set(FUSIONS)):
        raise ValueError(f"expected auto, none, or some of {', '.join(FUSIONS)}, got {', '.join(unknown)[:80]}")
    return names


FORMAT_ALIASES = {"JPG": "JPEG", "JPE": "JPEG", "JFIF": "JPEG", "TIF": "TIFF", "HEIC": "HEIF", "APNG": "PNG"}
"""Common file extensions of formats that the operator may allow."""


def _known_formats(value: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(FORMAT_ALIASES.get(name.upper(), name.upper()) for name in value))
    if unknown := sorted(set(names) - READABLE):
        raise ValueError(f"expected formats of {', '.join(sorted(READABLE))}, got {', '.join(unknown)[:80]}")
    if "HEIF" in names and find_spec("pillow_heif") is None:
        raise ValueError("HEIF (HEIC) needs pillow-heif: run pip install '.[worker,heic]' in a clone of shiwu")
    return names


_DEVICE: Final = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
MAX_USER_AGENT_CHARS: Final = 256
MAX_NAME_BYTES: Final = 255
MAX_DURATION_S: Final = 10 * 365 * 86400
"""Ten years. Clocks, sockets and Redis refuse durations of several hundred years."""


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value.lower()):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {value!r:.80}")
    return value.lower()


def check_output_file(path: Path) -> Path:
    """Return the path if the worker can create the file, or write to it.

    Raises:
        ValueError: it cannot; the text says why.
    """
    # By os.path, because methods of Path raise OSError for a folder that this user may not search.
    folder = path.parent
    if os.path.isdir(path):
        raise ValueError(f"expected a file, got the folder {path}")
    if not os.path.isdir(folder):
        raise ValueError(f"expected a file in a folder that exists, got {path}; make the folder {folder}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"expected a file that this user may write, got {path}")
    return path


def _check_probe_file(path: Path) -> Path:
    if os.path.islink(path):
        raise ValueError(f"expected a file, got the link {path}, which the worker does not follow; remove the link")
    return check_output_file(path)


def _check_worker_name(value: str) -> str:
    if printable(value) != value or len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"expected at most {MAX_NAME_BYTES} bytes without control characters, got {value!r:.80}")
    return value


def check_duration(name: str, value: object) -> None:
    """Refuse a duration that is too long for clocks, sockets and Redis.

    Raises:
        ValueError: it is longer than ten years.
    """
    per_s = {"s": 1, "ms": 1000}.get(name.rpartition("_")[2])
    if per_s is not None and isinstance(value, int | float) and value > MAX_DURATION_S * per_s:
        raise ValueError(f"expected at most ten years, got {value:g}")


_REGION: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _check_endpoint(value: str) -> str:
    """Return the URL of a store if it is valid. The message omits it, because it may contain a password."""
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        is_valid = is_valid and not (parts.query or parts.fragment or " " in value) and value.isprintable()
        is_valid = is_valid and "@" not in parts.path
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("expected http://host[:port] or https://host[:port], got something else")
    return value


def _check_region(value: str) -> str:
    if not _REGION.fullmatch(value):
        raise ValueError(f"expected the name of a region as eu-west-1, got {value!r:.80}")
    return value


def _check_user_agent(value: str) -> str:
    if not value.isascii() or not value.isprintable() or len(value) > MAX_USER_AGENT_CHARS:
        raise ValueError(f"expected at most {MAX_USER_AGENT_CHARS} printable ASCII characters")
    return value


def read_lane(text: object) -> Lane:
    """Return a lane by its name, or by the name of its queue.

    Raises:
        ValueError: for any other text.
    """
    for lane in Lane:
        if text in {lane, lane.queue}:
            return lane
    raise ValueError(f"expected lanes of {', '.join(Lane)}, got {text!r:.80}")


def _some_lanes(value: tuple[Lane, ...]) -> tuple[Lane, ...]:
    if not value:
        raise ValueError(f"expected at least one lane of {', '.join(Lane)}")
    return tuple(lane for lane in Lane if lane in value)


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"expected a time zone as UTC or Asia/Shanghai, got {name!r:.80}") from None
    return name


Device = Annotated[str, AfterValidator(_check_device)]
WorkerName = Annotated[str, AfterValidator(_check_worker_name)]
ProbeFile = Annotated[Path, AfterValidator(_check_probe_file)]
Names = Annotated[tuple[str, ...], NoDecode]
Lanes = Annotated[tuple[Annotated[Lane, BeforeValidator(read_lane)], ...], NoDecode, AfterValidator(_some_lanes)]
Timezone = Annotated[str, AfterValidator(_known_zone)]
Fusions = Annotated[tuple[str, ...], NoDecode, AfterValidator(_known_fusions)]
Formats = Annotated[tuple[str, ...], NoDecode, AfterValidator(_known_formats)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(checked(read_host))], ...], NoDecode]
Networks = Annotated[tuple[Annotated[str, AfterValidator(checked(read_network))], ...], NoDecode]
Prefixes = Annotated[tuple[Annotated[str, AfterValidator(checked(read_nat64))], ...], NoDecode]
Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], NoDecode]
Paths = Annotated[tuple[Path, ...], NoDecode]
Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Region = Annotated[str, AfterValidator(_check_region)]
UserAgent = Annotated[str, AfterValidator(_check_user_agent)]
S3Client = Annotated[Literal["boto3", "obstore"], AfterValidator(_has_client)]
Traces = Annotated[bool, AfterValidator(_has_otel)]
Retries = Annotated[dict[ErrorCode, tuple[int, float, float]], NoDecode]


def split(text: str) -> list[str]:
    """Split a list at commas, and strip spaces."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_retry(part: str) -> tuple[ErrorCode, tuple[int, float, float]]:
    """Return code and limits of one item of SHIWU_RETRY, `code=tries:first_s:longest_s`.

    Raises:
        ValueError: another form, a code that is never retried, or numbers out of order.
    """
    code, _, numbers = part.strip().partition("=")
    try:
        attempts, first_s, longest_s = numbers.split(":")
        policy = (int(attempts), float(first_s), float(longest_s))
        is_retriable = ErrorCode(code) in RETRIABLE
    except ValueError:
        raise ValueError(f"expected code=tries:first_s:longest_s, got {part.strip()!r:.80}") from None
    if not is_retriable or policy[0] < 1 or not 0 < policy[1] <= policy[2] <= MAX_DURATION_S:
        allowed = ", ".join(sorted(RETRIABLE))
        raise ValueError(
            f"expected one of {allowed} with 1 or more tries and 0 < first_s <= longest_s, got {part!r:.80}"
        )
    return ErrorCode(code), policy
