"""A queue of SQS: long polls, deletion after the jobs are enqueued, and a visibility that is extended meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from shiwu.broker.chunks import chunks
from shiwu.watch.formats import read_message
from shiwu.watch.intake import Message
from shiwu.watch.sources.base import SourceUnavailable, SourceWrong, Taken

AT_ONCE: Final = 10
"""Messages in one call, which is SQS' limit."""
MAX_WAIT_S: Final = 20
"""Of a long poll, which is SQS' limit."""
VISIBILITY_S: Final = 120
"""How long a message that was taken is hidden from other watchers."""
EXTEND_EVERY_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5
READ_TIMEOUT_S: Final = 30
_AWS_HOST: Final = re.compile(r"(?:sqs|queue)\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")
_WRONG: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AWS.SimpleQueueService.NonExistentQueue",
        "InvalidAddress",
        "InvalidClientTokenId",
        "OptInRequired",
        "QueueDoesNotExist",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
"""Codes of errors that time does not cure."""
Receipt = str


class Sqs:
    """One queue.

    Args:
        address: what follows `sqs://`: the name of a queue, or its URL with or without `https://`.
    """

    def __init__(self, address: str) -> None:
        self.name = f"sqs://{address}"
        self._address = address
        self._client: Any = None
        self._url = ""
        self._extended_s = 0.0

    def check(self) -> str:
        """About how many messages wait."""
        client = self._connect()
        with _source_errors(self.name):
            wanted = ["ApproximateNumberOfMessages"]
            reply = client.get_queue_attributes(QueueUrl=self._url, AttributeNames=wanted)
        return f"about {reply['Attributes'][wanted[0]]} messages wait"

    def take(self, count: int, *, wait_s: float) -> Sequence[Taken[Receipt]]:
        """Receive messages; only the first call waits."""
        client = self._connect()
        self._extended_s = time.monotonic()
        taken: list[Taken[Receipt]] = []
        # With 0 SQS asks only some of its servers, and an empty reply would not mean an empty queue.
        wait = min(MAX_WAIT_S, max(1, int(wait_s)))
        while len(taken) < count:
            try:
                with _source_errors(self.name):
                    reply = client.receive_message(
                        QueueUrl=self._url,
                        MaxNumberOfMessages=min(AT_ONCE, count - len(taken)),
                        VisibilityTimeout=VISIBILITY_S,
                        WaitTimeSeconds=wait,
                    )
            except SourceUnavailable:
                if taken:
                    break
                raise
            found = reply.get("Messages", ())
            taken += [(each["ReceiptHandle"], Message(each["Body"], read_message(each["Body"]))) for each in found]
            wait = 0
            if len(found) < AT_ONCE:
                break
        return taken

    def keep(self, taken: Sequence[Taken[Receipt]]) -> None:
        """Hide the messages for longer, where that is due."""
        if time.monotonic() - self._extended_s >= EXTEND_EVERY_S:
            self._hide(taken, seconds=VISIBILITY_S)
            self._extended_s = time.monotonic()

    def done(self, taken: Sequence[Taken[Receipt]]) -> None:
        """Delete the messages. One that SQS does not delete comes again, and is folded by its id."""
        self._in_batches(self._connect().delete_message_batch, taken)

    def give_back(self, taken: Sequence[Taken[Receipt]]) -> None:
        """Show the messages again."""
        self._hide(taken, seconds=0)

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def _hide(self, taken: Sequence[Taken[Receipt]], *, seconds: int) -> None:
        self._in_batches(self._connect().change_message_visibility_batch, taken, VisibilityTimeout=seconds)

    def _in_batches(self, call: Callable[..., Any], taken: Sequence[Taken[Receipt]], **more: int) -> None:
        for batch in chunks(list(taken), AT_ONCE):
            entries = [{"Id": str(n), "ReceiptHandle": receipt, **more} for n, (receipt, _) in enumerate(batch)]
            with _source_errors(self.name):
                call(QueueUrl=self._url, Entries=entries)

    def _connect(self) -> Any:
        if self._client is not None:
            return self._client
        with _source_errors(self.name):
            url, region, endpoint_url = _place(self._address)
            client = _make_client(region=region, endpoint_url=endpoint_url)
            self._url = url or client.get_queue_url(QueueName=self._address)["QueueUrl"]
        self._client = client
        return client


def _place(address: str) -> tuple[str, str | None, str | None]:
    """The URL of the queue, empty where only its name is known, its region, and the endpoint where it is not AWS'."""
    if "/" not in address:
        return "", None, None
    url = address if address.startswith(("https://", "http://")) else f"https://{address}"
    parts = urlsplit(url)
    if found := _AWS_HOST.fullmatch(parts.hostname or ""):
        return url, found[1], None
    return url, None, f"{parts.scheme}://{parts.netloc}"


def _make_client(*, region: str | None, endpoint_url: str | None) -> Any:
    import boto3  # noqa: PLC0415 an extra, and half a second
    from botocore.config import Config  # noqa: PLC0415 an extra

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 3},
    )
    return boto3.session.Session().client("sqs", region_name=region, endpoint_url=endpoint_url, config=config)


@contextmanager
def _source_errors(name: str) -> Iterator[None]:
    """Raise errors of boto3 as errors of the source."""
    from botocore.exceptions import (  # noqa: PLC0415 an extra
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
    )

    try:
        yield
    except (NoCredentialsError, NoRegionError, PartialCredentialsError) as error:
        text = f"{name}: {error} Set AWS_REGION and credentials as for any AWS client"
        raise SourceWrong(text) from error
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        kind = SourceWrong if code in _WRONG else SourceUnavailable
        raise kind(f"{name}: {error}") from error
    except (BotoCoreError, OSError) as error:
        raise SourceUnavailable(f"{name}: {error}") from error
