"""Time: the moments of one picture and the answer's milliseconds made from them, and whether a worker moves at all."""

from __future__ import annotations

import time
from dataclasses import dataclass

from shiwu.contract import Timing


class Progress:
    """When the pipeline last moved: jobs were claimed, encoded or settled, lanes found empty, or Redis was away."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def mark(self) -> None:
        """Say that something moved. Safe from any thread."""
        self._last_s = time.monotonic()

    def age_s(self) -> float:
        """Seconds since something moved."""
        return time.monotonic() - self._last_s


@dataclass(slots=True)
class Moments:
    """Monotonic seconds at the borders between stages; CLOCK_MONOTONIC is one clock for all processes of a machine.

    A moment that was never reached stays 0, and its stage has taken no time.
    """

    claimed_s: float
    queue_ms: float | None = None
    fetch_from_s: float = 0.0
    decode_from_s: float = 0.0
    batch_from_s: float = 0.0
    encode_from_s: float = 0.0
    score_from_s: float = 0.0

    def timing(self, until_s: float) -> Timing:
        """The stages up to now. They follow each other without gaps, so they add up to `total`."""
        from_s = self.claimed_s
        stages = []
        for moment in (
            self.fetch_from_s,
            self.decode_from_s,
            self.batch_from_s,
            self.encode_from_s,
            self.score_from_s,
        ):
            # A stage that was never reached lends its place to the one before it, which lasts until now.
            until = moment or until_s
            stages.append(round((until - from_s) * 1000, 3) if until > from_s else 0.0)
            from_s = max(from_s, until)
        claim, fetch, decode, batch, encode = stages
        score = round((until_s - from_s) * 1000, 3) if until_s > from_s else 0.0
        queue = self.queue_ms
        return Timing(
            queue=queue,
            claim=claim,
            fetch=fetch,
            decode=decode,
            batch=batch,
            encode=encode,
            score=score,
            total=round((queue or 0.0) + sum(stages) + score, 3),
        )
