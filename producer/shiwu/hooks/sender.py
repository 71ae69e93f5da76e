"""Makes one try of a delivery over HTTP, and says what its outcome means."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import urllib3
from urllib3.exceptions import HTTPError, SSLError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError

from shiwu.hooks.endpoints import Endpoint
from shiwu.hooks.signatures import aliyun_form, standard_headers
from shiwu.network.address_guard import AddressRefused, Resolve, UnknownHost, resolve_by_system
from shiwu.network.address_rules import AddressRules
from shiwu.network.http_client import HttpClient
from shiwu.network.http_replies import retry_after_s

MAX_REPLY_BYTES: Final = 64 * 1024
"""Bytes of a reply that are read, so that its connection can be used again."""
MAX_RETRY_AFTER_S: Final = 86_400.0
THROTTLED: Final = frozenset({429, 502, 504})
"""Statuses after which the whole endpoint gets a pause."""
GONE: Final = 410
CONNECT_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a try ended.

    `reason` is a word for logs and metrics: `delivered`, `http_<status>`, `redirect`, `timeout`, `tls`, `connection`,
    `address_refused`, `unknown_host`. It names no part of the URL or of the reply.
    """

    reason: str
    status: int | None = None
    retry_after_s: float | None = None
    """The pause that the receiver asks for; None if it asks for none."""

    @property
    def is_delivered(self) -> bool:
        """Whether the receiver has accepted the delivery."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants no further deliveries."""
        return self.status == GONE

    @property
    def is_throttled(self) -> bool:
        """Whether the receiver is overloaded."""
        return self.status in THROTTLED or self.retry_after_s is not None


class Sender:
    """Posts deliveries. Thread-safe. Every connection passes the address guard; no redirect is followed.

    Args:
        timeout_s: how long one try may take in all.
        threads: how many tries run at a time.
        resolve: name look-up, called once for each connection.
    """

    def __init__(
        self,
        rules: AddressRules,
        *,
        timeout_s: float,
        threads: int,
        user_agent: str,
        resolve: Resolve = resolve_by_system,
    ) -> None:
        self._timeout_s = timeout_s
        self._http = HttpClient(
            rules,
            threads=threads,
            connect_timeout_s=min(CONNECT_TIMEOUT_S, timeout_s),
            read_timeout_s=timeout_s,
            user_agent=user_agent,
            resolve=resolve,
        )

    def send(self, endpoint: Endpoint, *, delivery_id: str, url: str, body: bytes) -> Outcome:
        """Sign and post one body; never raises for what a receiver or the network does."""
        deadline_s = time.monotonic() + self._timeout_s
        headers, content = _signed(endpoint, delivery_id=delivery_id, body=body)
        try:
            response = self._http.send("POST", url, body=content, headers=headers, deadline_s=deadline_s)
        except AddressRefused:
            return Outcome(reason="address_refused")
        except UnknownHost:
            return Outcome(reason="unknown_host")
        except (HTTPError, OSError) as error:
            return Outcome(reason=_reason(error))
        _read_reply(response)
        return classify(response.status, response.headers)


def classify(status: int, headers: Mapping[str, str]) -> Outcome:
    """The outcome of a reply."""
    if 200 <= status < 300:
        return Outcome(reason="delivered", status=status)
    reason = "redirect" if 300 <= status < 400 else f"http_{status}"
    pause_s = retry_after_s(headers)
    return Outcome(
        reason=reason, status=status, retry_after_s=None if pause_s is None else min(pause_s, MAX_RETRY_AFTER_S)
    )


def _signed(endpoint: Endpoint, *, delivery_id: str, body: bytes) -> tuple[dict[str, str], bytes]:
    timestamp_s = int(time.time())
    if endpoint.style == "aliyun":
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "webhook-id": delivery_id,
            "webhook-timestamp": str(timestamp_s),
        }
        return headers, aliyun_form(endpoint.keys[0], uid=endpoint.uid, body=body)
    signed = standard_headers(endpoint.keys, delivery_id=delivery_id, timestamp_s=timestamp_s, body=body)
    return {"Content-Type": "application/json"} | signed, body


def _read_reply(response: urllib3.BaseHTTPResponse) -> None:
    """Read a short body, so that the connection can be used again, and close the connection of any other.

    The status has arrived, so what happens to the body changes no outcome.
    """
    try:
        is_whole = len(response.read(MAX_REPLY_BYTES)) < MAX_REPLY_BYTES
    except (HTTPError, OSError):
        is_whole = False
    if not is_whole:
        response.close()
    response.release_conn()


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError | Urllib3TimeoutError):
            return "timeout"
        if isinstance(cause, SSLError):
            return "tls"
        cause = cause.__cause__ or cause.__context__
    return "connection"
