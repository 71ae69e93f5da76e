"""Shapes in which clients write a message: where the id stands, and what is odd about it."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any, Final

TASK: Final = "shiwu.tag"
ODD_IDS: Final = (
    "with space",
    "user@host",
    "猫/é",
    'quote"back\\slash',
    "new\nline\tand\x1b[31mcolour",
    "a|b|c",
    "~tilde",
    "-dash",
    "nul\0byte",
    "😀",
    "x" * 255,
)
"""Ids that Celery takes, each of which breaks a parser that counts on something."""


def encoded(body: object) -> str:
    """A body as kombu's Redis transport writes it."""
    return base64.b64encode(json.dumps(body).encode()).decode()


def message(body: str, *, headers: Any = None, properties: dict[str, Any] | None = None, **outer: Any) -> bytes:
    """A message around a body that is base64."""
    fields = {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {} if headers is None else headers,
        "properties": {"body_encoding": "base64"} | (properties or {}),
    }
    return json.dumps(fields | outer).encode()


def protocol_2(job_id: Any, image: str, *, headers: dict[str, Any] | None = None, **properties: Any) -> bytes:
    """The id in the headers; None leaves it out."""
    own = {"task": TASK, **({} if job_id is None else {"id": job_id}), **(headers or {})}
    return message(encoded([[image], {}, {}]), headers=own, properties=properties)


def protocol_1(job_id: Any, image: str, *, correlation_id: str | None = None, **fields: Any) -> bytes:
    """The id in the body; gocelery writes another one as correlation id."""
    body = {"id": job_id, "task": TASK, "args": [image], "kwargs": {}} | fields
    return message(encoded(body), properties={"correlation_id": correlation_id} if correlation_id else None)


def packed(raw: bytes) -> bytes:
    """The same message with a body that is compressed."""
    outer = json.loads(raw)
    outer["body"] = base64.b64encode(gzip.compress(base64.b64decode(outer["body"]))).decode()
    outer["headers"] |= {"compression": "application/x-gzip"}
    return json.dumps(outer).encode()


Shape = tuple[bytes, str, str]
"""A message, the id under which its client looks for the answer, and the answer's status or error code."""


def shapes(image: str, *, prefix: str = "") -> dict[str, Shape]:
    """Every shape by its name; `prefix` stands in front of each id."""
    return {
        **_ids(image, prefix),
        **_bodies_of_protocol_1(image, prefix),
        **_bodies_of_protocol_2(image, prefix),
        **_rejected(image, prefix),
    }


def _ids(image: str, p: str) -> dict[str, Shape]:
    return {
        **{f"id {n}": (protocol_2(p + job_id, image), p + job_id, "tagged") for n, job_id in enumerate(ODD_IDS[:-1])},
        "255 bytes": (protocol_2((p + "x" * 255)[:255], image), (p + "x" * 255)[:255], "tagged"),
        "number": (protocol_2(len(p) * 1000 + 7, image), str(len(p) * 1000 + 7), "tagged"),
        "number as float": (protocol_2(len(p) * 1000 + 8.0, image), str(len(p) * 1000 + 8), "tagged"),
        "large number": (protocol_2(2**60 + len(p), image), str(2**60 + len(p)), "tagged"),
        "correlation id": (
            protocol_2(None, image, correlation_id=f"{p}by-correlation"),
            f"{p}by-correlation",
            "tagged",
        ),
    }


def _bodies_of_protocol_1(image: str, p: str) -> dict[str, Shape]:
    long_labels = {"labels": [f"标签{n}" for n in range(900)], "top_k": 1}
    return {
        "protocol 1": (protocol_1(f"{p}one", image), f"{p}one", "tagged"),
        "protocol 1, another correlation id": (
            protocol_1(f"{p}one-go", image, correlation_id=f"{p}not-this"),
            f"{p}one-go",
            "tagged",
        ),
        "protocol 1, packed": (
            packed(protocol_1(f"{p}one-packed", image, correlation_id=f"{p}one-packed")),
            f"{p}one-packed",
            "tagged",
        ),
        "protocol 1, long body": (
            protocol_1(f"{p}one-long", image, correlation_id=f"{p}not-this", kwargs=long_labels),
            f"{p}one-long",
            "tagged",
        ),
        "protocol 1, id behind arguments": (
            message(encoded({"args": [image], "kwargs": long_labels, "task": TASK, "id": f"{p}one-last"})),
            f"{p}one-last",
            "tagged",
        ),
        "protocol 1, PHP's empty lists": (
            message(encoded({"id": f"{p}php", "task": TASK, "args": [image], "kwargs": []}), headers=[]),
            f"{p}php",
            "tagged",
        ),
    }


def _bodies_of_protocol_2(image: str, p: str) -> dict[str, Shape]:
    return {
        "protocol 2 headers, protocol 1 body": (
            message(encoded({"args": [image], "kwargs": {}}), headers={"task": TASK, "id": f"{p}hybrid"}),
            f"{p}hybrid",
            "tagged",
        ),
        "null arguments": (
            message(encoded([None, {"image": image}, None]), headers={"task": TASK, "id": f"{p}null"}),
            f"{p}null",
            "tagged",
        ),
        "charset": (
            message(
                encoded([[image], {}, {}]),
                headers={"task": TASK, "id": f"{p}charset"},
                **{"content-type": "application/json; charset=utf-8"},
            ),
            f"{p}charset",
            "tagged",
        ),
    }


def _rejected(image: str, p: str) -> dict[str, Shape]:
    large = {"metadata": "x" * 5_000_000}
    lone = json.dumps({"headers": {"task": TASK, "id": f"{p}\ud800lone"}, "body": "", "properties": {}}).encode()
    lone_in_header = protocol_2(f"{p}lone-in-header", image).replace(
        b'"headers": {', b'"headers": {"shadow": "\\ud800", '
    )
    return {
        "lone surrogate in the id": (lone, f"{p}\ufffdlone", "malformed_message"),
        "lone surrogate next to the id": (lone_in_header, f"{p}lone-in-header", "malformed_message"),
        "5 MB": (
            message(encoded([[image], large, {}]), headers={"task": TASK, "id": f"{p}large"}),
            f"{p}large",
            "message_too_large",
        ),
        "5 MB, protocol 1": (
            protocol_1(f"{p}one-large", image, correlation_id=f"{p}not-this", kwargs=large),
            f"{p}one-large",
            "message_too_large",
        ),
        "5 MB, plain body": (
            message(
                json.dumps([[image], large, {}]),
                headers={"task": TASK, "id": f"{p}plain"},
                properties={"body_encoding": ""},
            ),
            f"{p}plain",
            "message_too_large",
        ),
        "256 bytes": (protocol_2((p + "y" * 256)[:256], image), (p + "y" * 256)[:256], "invalid_id"),
        "form of a digest": (protocol_2("~" + "0a" * 20, image), "~" + "0a" * 20, "invalid_id"),
        "another task": (
            message(encoded([[], {}, {}]), headers={"task": "a.b", "id": f"{p}other"}),
            f"{p}other",
            "unknown_task",
        ),
        "protocol 1, another task": (protocol_1(f"{p}other-one", image, task="a.b"), f"{p}other-one", "unknown_task"),
    }
