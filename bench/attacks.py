"""What a hostile producer sends to the bulk lane: each attack is a list of messages, most with a cost of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.support.picture_server import PictureServer, Reply

from bench.traffic import Message
from shiwu.broker.message_writer import build_message
from shiwu.contract import Lane, Request

DRIPPING_HOSTS: Final = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
DRIP_PAUSE_S: Final = 1.0
"""Pause between two bytes of a dripping image."""
DRIPPED_BYTES: Final = 100_000
LABELS_OF_REQUEST: Final = 1000
LONG_LABEL: Final = "很长的标签" * 12
"""60 characters of three bytes: a thousand such labels stay just below the largest message."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the messages of an attack may name."""

    references: Sequence[str]
    """Images that can be fetched."""
    dripping: Sequence[str]
    """Prefixes of URLs whose replies drip."""


@dataclass(frozen=True, slots=True)
class Attack:
    """Messages of one kind."""

    name: str
    count: int
    quick_count: int
    make: Callable[[Target, int], Request] = field(repr=False)
    """The request with this number."""

    def messages(self, target: Target, *, is_quick: bool) -> Iterator[Message]:
        """Build the messages of this attack."""
        for number in range(self.quick_count if is_quick else self.count):
            job_id = f"attack-{number}"
            yield Message(job_id, build_message(self.make(target, number), job_id=job_id, lane=Lane.BULK))


def _ordinary(target: Target, number: int) -> Request:
    return Request(image=target.references[number % len(target.references)])


def _new_labels(target: Target, number: int) -> Request:
    labels = tuple(f"标签{number}之{word}" for word in range(LABELS_OF_REQUEST))
    return Request(image=target.references[number % len(target.references)], labels=labels)


def _dripping(target: Target, number: int) -> Request:
    return Request(image=f"{target.dripping[number % len(target.dripping)]}/drip/{number}.jpg")


def _rejected(_: Target, number: int) -> Request:
    # `model_construct` checks nothing, as a producer without shiwu's client does.
    return Request.model_construct(image=f"ftp://nowhere/{number}.jpg")


def _large_answer(target: Target, number: int) -> Request:
    return Request(
        image=target.references[number % len(target.references)],
        labels=tuple(f"{word}{LONG_LABEL}" for word in range(LABELS_OF_REQUEST)),
        top_k=LABELS_OF_REQUEST,
        metadata="x" * 4000,
        want=("tags", "embedding"),
    )


ORDINARY: Final = Attack("ordinary bulk", 1000, 50, _ordinary)
ATTACKS: Final = (
    Attack("new labels", 1000, 20, _new_labels),
    Attack("dripping hosts", 200, 50, _dripping),
    Attack("cheap rejects", 10_000, 500, _rejected),
    Attack("large answers", 500, 20, _large_answer),
)


@contextmanager
def dripping_servers() -> Iterator[list[PictureServer]]:
    """Servers on several addresses of this machine whose every image takes a day."""
    with ExitStack() as stack:
        servers = [stack.enter_context(PictureServer(address=address)) for address in DRIPPING_HOSTS]
        reply = Reply.picture(b"\xff\xd8" + bytes(DRIPPED_BYTES)).drip(pause_s=DRIP_PAUSE_S)
        for server in servers:
            for number in range(ATTACKS[1].count):
                server.serve(f"/drip/{number}.jpg", reply)
        yield servers
