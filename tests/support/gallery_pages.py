"""Answers for gallery pages, and what is in a page that was rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

from shiwu.contract import Answer, ErrorInfo, ImageInfo, Stage, Status, Tag, Timing
from shiwu.gallery.page import render_page
from shiwu.gallery.thumbnails import Thumbnail


def tagged(job_id: str, *, reference: str = "", tags: Mapping[str, float] | None = None, total: float = 50.0) -> Answer:
    """An answer with tags: label → score."""
    scores = {"猫": 0.7, "狗": 0.2} if tags is None else tags
    return Answer(
        id=job_id,
        status=Status.TAGGED,
        image=ImageInfo(reference=reference or f"s3://images/{job_id}.jpg"),
        tags=tuple(Tag(label=label, score=score, cosine=0.3) for label, score in scores.items()),
        timing=Timing(fetch=total / 5, encode=total * 4 / 5, total=total),
    )


def rejected(job_id: str, *, code: str = "source_not_found", text: str = "S3 answered NoSuchKey") -> Answer:
    """An answer with an error."""
    return Answer(
        id=job_id,
        status=Status.REJECTED,
        image=ImageInfo(reference=f"s3://images/{job_id}.jpg"),
        error=ErrorInfo(code=code, message=text, stage=Stage.FETCH),
        timing=Timing(fetch=9.0, total=9.0),
    )


def render(
    answers: Sequence[Answer],
    thumbnails: Mapping[str, Thumbnail] | None = None,
    *,
    title: str = "gallery",
    note: str | None = None,
    others: Mapping[str, Answer] | None = None,
) -> str:
    """The page of these answers."""
    made_at = datetime(2026, 11, 30, 12, tzinfo=UTC)
    return render_page(answers, thumbnails or {}, title=title, note=note, made_at=made_at, others=others)


class ParsedPage(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, and those in it that have no end."""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Note a text."""
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The cards as the script of the page reads them."""
        cards: list[dict[str, Any]] = json.loads(self.texts["script"][0])
        return cards
