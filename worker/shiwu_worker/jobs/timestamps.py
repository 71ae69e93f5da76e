"""The times at which one job passed from stage to stage, and the milliseconds of its answer."""

from __future__ import annotations

import msgspec

from shiwu.contract import Timing


class StageTimestamps(msgspec.Struct, eq=False, gc=False):
    """Monotonic seconds at the borders between stages; CLOCK_MONOTONIC is one clock for all processes of a machine.

    A moment that was never reached stays 0, and its stage has taken no time.
    """

    claimed_s: float
    claimed_ms: float = 0.0
    """The same moment by Redis' clock, in ms since 1970; 0 where it is not known."""
    queue_ms: float | None = None
    earlier_ms: float | None = None
    """From the enqueue until the job was in its lane for the last time, where that is later."""
    fetch_from_s: float = 0.0
    decode_from_s: float = 0.0
    batch_from_s: float = 0.0
    encode_from_s: float = 0.0
    score_from_s: float = 0.0

    def timing(self, until_s: float) -> Timing:
        """The stages up to now. They follow each other without gaps, so they add up to `total`."""
        begins = (
            self.fetch_from_s,
            self.decode_from_s,
            self.batch_from_s,
            self.encode_from_s,
            self.score_from_s,
            until_s,
        )
        from_s, stages = self.claimed_s, []
        for moment in begins:
            # A stage that was never reached lends its place to the one before it, which lasts until now.
            until = moment or until_s
            if until > from_s:
                # Not by `round`, which writes and reads the number: eight of these are made for every picture.
                stages.append(int((until - from_s) * 1e6 + 0.5))
                from_s = until
            else:
                stages.append(0)
        claim, fetch, decode, batch, encode, score = stages
        total = sum(stages) + int(((self.queue_ms or 0.0) + (self.earlier_ms or 0.0)) * 1000 + 0.5)
        return Timing(
            queue=self.queue_ms,
            claim=claim / 1000,
            fetch=fetch / 1000,
            decode=decode / 1000,
            batch=batch / 1000,
            encode=encode / 1000,
            score=score / 1000,
            earlier=self.earlier_ms,
            total=total / 1000,
        )
