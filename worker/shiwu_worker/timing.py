"""Where the time of one picture went: moments on the way, and the answer's milliseconds made from them."""

from __future__ import annotations

from dataclasses import dataclass

from shiwu.contract import Timing


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
        borders = [
            self.claimed_s,
            self.fetch_from_s,
            self.decode_from_s,
            self.batch_from_s,
            self.encode_from_s,
            self.score_from_s,
        ]
        stages = [0.0] * 6
        last, stage = borders[0], 0
        for number, moment in enumerate(borders[1:], start=1):
            if moment:
                stages[stage] = max(0.0, round((moment - last) * 1000, 3))
                last, stage = moment, number
        stages[stage] = max(0.0, round((until_s - last) * 1000, 3))
        claim, fetch, decode, batch, encode, score = stages
        queue = self.queue_ms
        return Timing(
            queue=queue,
            claim=claim,
            fetch=fetch,
            decode=decode,
            batch=batch,
            encode=encode,
            score=score,
            total=round((queue or 0.0) + sum(stages), 3),
        )
