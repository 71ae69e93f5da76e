"""Renders the page. Everything that answers say is data in JSON, which the script shows as text.

The page's policy (CSP) lets it load nothing but the thumbnails that are in it, and run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any, Final
from urllib.parse import unquote

import jinja2
import msgspec
from markupsafe import Markup

from shiwu.contract import Answer, printable, scheme_of, without_query
from shiwu.gallery.thumbnails import Thumbnail

MAX_TEXT_CHARS: Final = 2000
"""Longer references and messages are cut."""
STAGES: Final = ("earlier", "queue", "claim", "fetch", "decode", "batch", "encode", "score")
"""Fields of `Timing`, in the order of the bar."""


def render_page(
    answers: Sequence[Answer],
    thumbnails: Mapping[str, Thumbnail],
    *,
    title: str,
    note: str | None,
    made_at: datetime,
    others: Mapping[str, Answer] | None = None,
) -> str:
    """The page as HTML.

    Args:
        thumbnails: by reference; images without one get a placeholder with the reason.
        note: why thumbnails are missing, for the head of the page.
        others: answers to compare with, by the id of the answer that each is shown next to; None for no comparison.
    """
    style, script = _asset("gallery.css"), _asset("gallery.js")
    return _template().render(
        title=_text(title),
        note=_text(note) if note else None,
        made_at=made_at.strftime("%Y-%m-%d %H:%M UTC"),
        count=len(answers),
        facts=list(_facts(answers)),
        other_facts=[] if others is None else list(_facts(list(others.values()))),
        is_compared=others is not None,
        stages=STAGES,
        style=Markup(style),  # noqa: S704 a file of this package
        script=Markup(script),  # noqa: S704 a file of this package
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        data=Markup(_embeddable([_card(answer, thumbnails, others) for answer in answers])),  # noqa: S704 no `<` is left in it
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html.j2"))


@cache
def _asset(name: str) -> str:
    return files("shiwu.gallery").joinpath("assets", name).read_text(encoding="utf-8")


def csp_hash(text: str) -> str:
    """The source of a policy (CSP) that allows this inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embeddable(data: object) -> str:
    """JSON that ends no script element and begins no comment, whatever its texts say."""
    return msgspec.json.encode(data).decode().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    """A text of an answer, with control and direction characters spelled out."""
    return printable(text)[:MAX_TEXT_CHARS]


def _facts(answers: Sequence[Answer]) -> Iterator[tuple[str, str]]:
    """Which models and label sets answered, the most frequent first."""
    models = Counter(f"{one.model.id} ({one.model.dtype}, {one.model.device})" for one in answers if one.model)
    labels = Counter(f"{one.labels.name or 'inline'} ({one.labels.count})" for one in answers if one.labels)
    for name, counts in (("model", models), ("labels", labels)):
        for text, _ in counts.most_common(3):
            yield name, _text(text)
        if len(counts) > 3:
            yield name, f"and {len(counts) - 3} more"


def _readable(reference: str) -> str:
    """A reference as a person reads it: names in URLs without percent-encoding, where these are UTF-8."""
    if scheme_of(reference) == "s3":
        return reference  # there a percent sign is a part of the name
    try:
        return unquote(reference, errors="strict")
    except UnicodeDecodeError:
        return reference


def _card(answer: Answer, thumbnails: Mapping[str, Thumbnail], others: Mapping[str, Answer] | None) -> dict[str, Any]:
    """What the script shows of one answer."""
    image = answer.image
    reference = without_query(image.reference) if image else ""
    card: dict[str, Any] = {
        "id": _text(answer.id),
        "status": _text(str(answer.status)),
        "ref": _text(reference),
        "tags": _tags(answer),
        "ms": [_finite(getattr(answer.timing, stage) or 0.0) for stage in STAGES],
        "total": _finite(answer.timing.total),
        "attempts": answer.attempts,
    }
    if (readable := _text(_readable(reference))) != card["ref"]:
        card["readable"] = readable
    if image and image.width and image.height:
        card["size"] = _text(f"{image.format or ''} {image.width} × {image.height}".strip())
    if answer.error:
        card["code"] = _text(str(answer.error.code))
        card["message"] = _text(answer.error.message)
        card["stage"] = _text(str(answer.error.stage or ""))
    if answer.warnings:
        card["warnings"] = [_text(one.message) for one in answer.warnings]
    if others and (other := others.get(answer.id)):
        card["other"] = {"status": _text(str(other.status)), "tags": _tags(other)}
        if other.error:
            card["other"]["code"] = _text(str(other.error.code))
    thumbnail = thumbnails.get(image.reference) if image else None
    if thumbnail and thumbnail.webp:
        card["webp"] = thumbnail.webp
        card["changed"] = bool(image and image.sha256 and thumbnail.sha256 and image.sha256 != thumbnail.sha256)
    elif thumbnail and thumbnail.code:
        card["unseen"] = _text(thumbnail.code)
    return card


def _tags(answer: Answer) -> list[list[Any]]:
    """Label, score and cosine of each tag."""
    return [[_text(tag.label), _finite(tag.score), _finite(tag.cosine)] for tag in answer.tags or ()]


def _finite(value: float) -> float:
    """Rounded to what a reader can see. Numbers that JSON cannot write would end the script."""
    return round(value, 4) if math.isfinite(value) else 0.0
