"""Inputs from seeds by chance, through hypothesis, which shrinks what fails and says how to have it again."""

from __future__ import annotations

import random
import time
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import Target

EXAMPLES: Final = 300
"""In one portion, after which the clock is looked at."""
NUMBERS: Final = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0", b"\xff\xff", b"\0\1")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The same with a few changes: bytes, numbers, pieces left out, doubled or moved, the end cut off."""
    body = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        if not body:
            break
        at = chance.randrange(min(len(body), chance.choice((64, 1024, len(body)))))
        length = chance.randrange(1, 32)
        kind = chance.randrange(7)
        if kind == 0:
            body[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            body[at : at + 1] = chance.randbytes(1)
        elif kind == 2:
            number = chance.choice(NUMBERS)
            body[at : at + len(number)] = number
        elif kind == 3:
            del body[at : at + length]
        elif kind == 4:
            body[at:at] = body[at : at + length] * chance.randrange(1, 50)
        elif kind == 5:
            other = chance.randrange(len(body))
            body[at : at + length] = body[other : other + length]
        else:
            del body[chance.randrange(len(body)) :]
    return bytes(body)


def run(target: Target, *, seconds: float, start: int) -> int:
    """Fuzz one target for so long; return how many inputs it took, at least one. What breaks it is raised, shrunk.

    Args:
        start: the seed of the first portion; the same number gives the same inputs.
    """
    seeds, tried, until_s, has_failed = target.seeds(), 0, time.monotonic() + seconds, False

    def check(data: bytes, chance: random.Random) -> None:
        nonlocal tried, has_failed
        changed = mutated(data, chance)
        # When the time is over the rest of the last portion is let off, unless something is being shrunk, or a slow
        # machine has not come to the first one.
        if has_failed or not tried or time.monotonic() < until_s:
            tried += 1
            try:
                target.check(changed)
            except BaseException:  # whatever it raised is raised on
                has_failed = True
                raise

    while not tried or time.monotonic() < until_s:
        portion: Any = given(data=st.sampled_from(seeds), chance=st.randoms(use_true_random=False))(check)
        phases = [Phase.generate, Phase.shrink]
        options = settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )
        seed(start)(options(portion))()
        start += 1
    return tried
