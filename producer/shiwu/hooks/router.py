"""Turns answers into deliveries: which endpoints get an answer, and the bodies that they get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from shiwu.client.results import TagResult
from shiwu.client.stream_items import StreamItem
from shiwu.contract import moment
from shiwu.contract.answer import AnswerModel, ErrorWord, LaneWord, StatusWord
from shiwu.hooks.delivery_queue import NewDelivery, Payload
from shiwu.hooks.endpoints import Endpoint, Endpoints
from shiwu.hooks.signatures import batch_id, webhook_id

MAX_BATCH_BYTES: Final = 1024 * 1024
"""Bytes of answers in one body; a single answer may be larger."""


class Unrouted(StrEnum):
    """Why an answer did not go where its request wanted."""

    UNKNOWN_ENDPOINT = "unknown_endpoint"
    URL_REFUSED = "url_refused"


class ThinAnswer(AnswerModel, frozen=True):
    """What an endpoint with `thin` gets: enough to ask for the answer."""

    id: str
    status: StatusWord
    lane: LaneWord | None = None
    error: ErrorWord | None = None


@dataclass(frozen=True, slots=True)
class Routed:
    """The deliveries of a portion of answers."""

    deliveries: list[NewDelivery]
    unrouted: list[tuple[StreamItem, Unrouted]]


class Router:
    """Routes answers. Thread-safe.

    Args:
        allows_urls: whether a request may give a URL instead of the name of an endpoint.
    """

    def __init__(self, endpoints: Endpoints, *, has_urls: bool) -> None:
        self._endpoints = endpoints
        self._has_urls = has_urls and endpoints.for_urls is not None
        self.is_batching = any(endpoint.batch > 1 for endpoint in endpoints.named)
        """Whether some endpoint gets several answers in one body."""

    def is_named(self, key: str) -> bool:
        """Whether the file has an endpoint of this name."""
        return self._endpoints.find(key) is not None

    def is_known(self, key: str) -> bool:
        """Whether deliveries of this endpoint are made: it is in the file, or URLs of requests are allowed."""
        return self._endpoints.find(key) is not None or (self._has_urls and key.startswith("https://"))

    def endpoint(self, key: str, url: str | None) -> tuple[Endpoint, str] | None:
        """The endpoint and the URL of a delivery; None where it is not made any more."""
        found = self._endpoints.find(key) if url is None else self._endpoints.at(url) if self._has_urls else None
        return None if found is None else (found, url or found.url)

    def route(self, items: Sequence[StreamItem]) -> Routed:
        """The deliveries of these answers, in their order; answers that no endpoint wants have none."""
        batches: dict[str, tuple[Endpoint, list[StreamItem]]] = {}
        routed = Routed([], [])
        for item in items:
            for endpoint in self._endpoints_of(item, routed):
                batches.setdefault(endpoint.key + endpoint.url, (endpoint, []))[1].append(item)
        for endpoint, wanted in batches.values():
            if endpoint.batch == 1:
                routed.deliveries.extend(_single(endpoint, item) for item in wanted)
            else:
                routed.deliveries.extend(_batch(endpoint, part) for part in _parts(endpoint, wanted))
        return routed

    def _endpoints_of(self, item: StreamItem, routed: Routed) -> Iterable[Endpoint]:
        yield from (endpoint for endpoint in self._endpoints.named if endpoint.wants(item.result))
        callback = item.result.callback
        if callback is None or self._endpoints.find(callback) is not None:
            return
        if not callback.startswith("https://"):
            routed.unrouted.append((item, Unrouted.UNKNOWN_ENDPOINT))
        elif not self._has_urls or (endpoint := self._endpoints.at(callback)) is None:
            routed.unrouted.append((item, Unrouted.URL_REFUSED))
        else:
            yield endpoint


def _single(endpoint: Endpoint, item: StreamItem) -> NewDelivery:
    return NewDelivery(
        endpoint=endpoint.key,
        id=webhook_id(item.result.id, item.generation),
        payload=Payload(1, endpoint.url if endpoint.is_from_request else None),
        body=envelope(f"answer.{item.result.status}", at=_answered_at(item), data=_data(endpoint, item.result)),
    )


def _batch(endpoint: Endpoint, items: list[tuple[StreamItem, bytes]]) -> NewDelivery:
    data = b"[" + b",".join(raw for _, raw in items) + b"]"
    return NewDelivery(
        endpoint=endpoint.key,
        id=batch_id([webhook_id(item.result.id, item.generation) for item, _ in items]),
        payload=Payload(len(items)),
        body=envelope("answers", at=_answered_at(items[-1][0]), data=data),
    )


def _parts(endpoint: Endpoint, items: Iterable[StreamItem]) -> Iterable[list[tuple[StreamItem, bytes]]]:
    part: list[tuple[StreamItem, bytes]] = []
    size = 0
    for item in items:
        raw = _data(endpoint, item.result)
        if part and (len(part) == endpoint.batch or size + len(raw) > MAX_BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append((item, raw))
        size += len(raw)
    if part:
        yield part


def envelope(kind: str, *, at: datetime, data: bytes) -> bytes:
    """The body of a delivery: type, timestamp and data, as Standard Webhooks recommends."""
    kind_json, at_json = msgspec.json.encode(kind), msgspec.json.encode(at)
    return b'{"type":' + kind_json + b',"timestamp":' + at_json + b',"data":' + data + b"}"


def _data(endpoint: Endpoint, result: TagResult) -> bytes:
    if not endpoint.is_thin:
        return result.to_json()
    error = result.error.code if result.error else None
    return ThinAnswer(id=result.id, status=result.status, lane=result.lane, error=error).to_json()


def _answered_at(item: StreamItem) -> datetime:
    # The first part of an entry's id is the time of the server.
    return item.result.answered_at or moment(float(item.entry_id.partition("-")[0]))
