"""Systems that take turns of a few seconds on one machine.

All are started, and all but one are stopped in their tracks (SIGSTOP). A virtual machine's speed drifts by a third
within a minute; a ratio of neighbouring turns does not, and the turns of a whole run say how sure it is.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.support.servers import Valkey

from bench import traffic, usage
from bench.backlog import Drained, drain
from bench.gpu import Watch, watching
from bench.picture_systems import Place, Running, System
from bench.report import ratio
from bench.traffic import Listener, Reply

AHEAD: Final = 3
"""Turns for which jobs wait in the lane: no system may run dry."""
LEAST_AHEAD: Final = 64
READ: Final = 20_000
"""Of so many answers the batches and stages are told."""
FEEL_S: Final = 2.0
SETTLE_S: Final = 0.05
"""Until the answers of a turn that has ended are heard."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system did in one turn."""

    pictures: float
    seconds: float
    own_cpu_s: float = 0.0
    below_cpu_s: float = 0.0
    busy_percent: float = math.nan
    """Of the GPU."""


def rate(turns: Sequence[Turn]) -> float:
    """Pictures a second over all their seconds."""
    return ratio(sum(one.pictures for one in turns), sum(one.seconds for one in turns))


class Player:
    """A system that is ready and warm, stopped but for its turns.

    Args:
        per_second: pictures, felt beforehand: how many jobs a turn may need.
    """

    def __init__(self, place: Place, running: Running, listener: Listener, watch: Watch, *, per_second: float) -> None:
        self._place = place
        self._running = running
        self._listener = listener
        self._watch = watch
        self._per_second = per_second
        self._sent: list[str] = []
        self._stopped: list[int] = []

    def turn(self, seconds: float) -> Turn:
        """Let it work for so long.

        Raises:
            RuntimeError: its lane ran dry, so that it may have waited.
        """
        self._top_up(seconds)
        looks, before, cpu_s = self._watch.looks(), len(self._listener.arrivals), self._running.cpu_s()
        began_s = time.monotonic()
        self.resume()
        time.sleep(seconds)  # the turn itself
        self.pause()
        took_s = time.monotonic() - began_s
        time.sleep(SETTLE_S)  # an answer in the server's hands has no other sign of its arrival
        self._running.check()
        if not self._waiting():
            raise RuntimeError(f"expected jobs to be left after a turn, {len(self._sent)} were too few")
        own_s, below_s = (after - begin for begin, after in zip(cpu_s, self._running.cpu_s(), strict=True))
        found = Turn(
            len(self._listener.arrivals) - before, took_s, own_s, below_s, self._watch.since(looks).busy_percent
        )
        self._per_second = max(self._per_second, rate([found]))
        return found

    def _waiting(self) -> int:
        waiting: Any = self._place.client.llen(self._place.lane.queue)
        return int(waiting)

    def _top_up(self, seconds: float) -> None:
        missing = LEAST_AHEAD + int(AHEAD * seconds * self._per_second) - self._waiting()
        references, lane = self._place.source.references, self._place.lane
        messages = traffic.build(references, count=max(0, missing), prefix=f"t{len(self._sent)}", lane=lane)
        traffic.send(self._place.client, lane, messages)
        self._sent += [one.id for one in messages]

    def pause(self) -> None:
        """Stop its processes, also those that it has started since."""
        self._stopped = usage.families([process.pid for process in self._running.processes])
        _signal(self._stopped, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        _signal(self._stopped, signal.SIGCONT)

    def replies(self) -> list[Reply]:
        """Its answers in the order in which the jobs were sent, the first some thousand.

        Raises:
            RuntimeError: it answered what it was not asked, or without tags.
        """
        answered = self._listener.arrivals.keys()
        if strange := answered - set(self._sent):
            raise RuntimeError(f"expected answers to what was sent, {len(strange)} are not, one is {strange.pop()}")
        return traffic.read(self._place.client, [one for one in self._sent if one in answered][:READ])


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True, slots=True)
class Seated:
    """A system at the table."""

    player: Player
    ready_s: float
    """From the start of its processes until they take jobs, while the others stood still."""
    felt: Drained
    """The backlog that warmed it."""
    memory_mib: float
    """That it took of the GPU."""


@contextmanager
def seated(place: Place, system: System) -> Iterator[Seated]:
    """Start a system on a server of its own, warm it, and stop it in its tracks."""
    with (
        watching(place.folder, system.name.replace(" ", "-")) as watch,
        Valkey(folder=place.folder / f"valkey-{system.name.replace(' ', '-')}") as server,
        server.client(socket_timeout=60) as client,
    ):
        own = replace(place, url=server.url, client=client)
        before, began_s = watch.since(), time.monotonic()
        with system.open(own) as running:
            ready_s = time.monotonic() - began_s
            felt = drain(own, running, seconds=FEEL_S).drained
            with traffic.listening(client) as listener:
                player = Player(own, running, listener, watch, per_second=felt.per_second)
                memory_mib = watch.since().memory_mib - before.memory_mib
                player.pause()
                try:
                    yield Seated(player, ready_s, felt, memory_mib)
                finally:
                    player.resume()  # what stands still does not end


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two rates."""

    value: float
    error: float
    """Its standard error by the delete-one jackknife over the rounds (Efron 1982, The Jackknife, ch. 3); not a number
    for one round."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def paired(rounds: Sequence[tuple[Sequence[Turn], Sequence[Turn]]]) -> Ratio:
    """Rate over rate, each round holding turns of both that were close together in time."""

    def over(kept: Sequence[tuple[Sequence[Turn], Sequence[Turn]]]) -> float:
        ours, theirs = ([turn for one in kept for turn in one[side]] for side in (0, 1))
        return ratio(rate(ours), rate(theirs))

    count = len(rounds)
    if count < 2:
        return Ratio(over(rounds), math.nan)
    left_out = [over([*rounds[:number], *rounds[number + 1 :]]) for number in range(count)]
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in left_out))
    return Ratio(over(rounds), error)
