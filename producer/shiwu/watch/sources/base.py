"""What the watcher asks of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from shiwu.watch.intake import Message

T = TypeVar("T")
Taken = tuple[T, Message]
"""What the source calls a message, and the message."""


class SourceUnavailable(Exception):
    """The source does not answer now, or refuses for now; the text says what happened. The watcher tries again."""


class SourceWrong(Exception):
    """The source cannot be read without a change of settings; the text says what was expected and what to do."""


class Source(Protocol[T]):
    """Messages that are taken, and removed once their jobs are enqueued. Used by one thread.

    Every method may raise `SourceUnavailable` and `SourceWrong`. A message that is neither done nor given back comes
    again, perhaps to another watcher.
    """

    name: str
    """For logs and messages that are kept, without a password."""

    def check(self) -> str:
        """Try to reach the source without taking anything; says what it found."""

    def take(self, count: int, *, wait_s: float) -> Sequence[Taken[T]]:
        """Take up to about `count` messages; waits up to `wait_s` for the first one. Empty where there is none."""

    def keep(self, taken: Sequence[Taken[T]]) -> None:
        """Keep these messages from other watchers; called at least every few seconds while their jobs must wait."""

    def done(self, taken: Sequence[Taken[T]]) -> None:
        """Remove these messages: their jobs are enqueued."""

    def give_back(self, taken: Sequence[Taken[T]]) -> None:
        """Let another watcher have these messages soon."""

    def close(self) -> None:
        """Close all connections."""
