"""Systems that take turns of a few seconds on one machine.

All are started, and all but one are stopped by SIGSTOP. A virtual machine's speed drifts by a third within a minute,
but a ratio of neighbouring turns does not; its standard error comes from all turns of a run.
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

TURNS_AHEAD: Final = 3
"""Number of turns for which jobs are enqueued, so that no lane runs empty."""
MIN_JOBS_AHEAD: Final = 64
TRIES: Final = 4
"""Turns that are tried before a system counts as too fast for what can be sent."""
MAX_REPLIES: Final = 20_000
"""Number of answers from which batches and stage times are computed."""
WARM_UP_S: Final = 2.0
SETTLE_S: Final = 0.05
"""Time until the last answers of a turn have arrived."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system did in one turn."""

    pictures: float
    seconds: float
    own_cpu_s: float = 0.0
    below_cpu_s: float = 0.0
    busy_percent: float = math.nan
    """Busy share of the GPU."""


def rate(turns: Sequence[Turn]) -> float:
    """Return images per second over all turns."""
    return ratio(sum(turn.pictures for turn in turns), sum(turn.seconds for turn in turns))


class Player:
    """A system that is ready and warm, and stopped except during its turns.

    Args:
        per_second: images per second, estimated before: how many jobs a turn may need.
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
        """Let the system work for `seconds`; again with more jobs where its lane ran empty, so that it may have waited.

        Raises:
            RuntimeError: its lane ran empty each time.
        """
        for _ in range(TRIES):
            found = self._turn(seconds)
            self._per_second = max(self._per_second, rate([found]))
            if self._waiting():
                return found
            # It was too fast for the estimate by as much as could be sent.
            self._per_second *= 2
        raise RuntimeError(f"expected jobs to be left after one of {TRIES} turns, {len(self._sent)} were too few")

    def _turn(self, seconds: float) -> Turn:
        self._top_up(seconds)
        samples, before, cpu_s = self._watch.samples(), len(self._listener.arrivals), self._running.cpu_s()
        began_s = time.monotonic()
        self.resume()
        time.sleep(seconds)  # the turn itself
        self.pause()
        took_s = time.monotonic() - began_s
        time.sleep(SETTLE_S)  # nothing else shows that the last answers have arrived
        self._running.check()
        own_s, below_s = (after - begin for begin, after in zip(cpu_s, self._running.cpu_s(), strict=True))
        return Turn(
            len(self._listener.arrivals) - before, took_s, own_s, below_s, self._watch.since(samples).busy_percent
        )

    def _waiting(self) -> int:
        waiting: Any = self._place.client.llen(self._place.lane.queue)
        return int(waiting)

    def _top_up(self, seconds: float) -> None:
        missing = MIN_JOBS_AHEAD + int(TURNS_AHEAD * seconds * self._per_second) - self._waiting()
        references, lane = self._place.source.references, self._place.lane
        messages = traffic.build(references, count=max(0, missing), prefix=f"t{len(self._sent)}", lane=lane)
        traffic.send(self._place.client, lane, messages)
        self._sent += [message.id for message in messages]

    def pause(self) -> None:
        """Stop its processes, including those started since."""
        self._stopped = usage.families([process.pid for process in self._running.processes])
        _signal(self._stopped, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes continue."""
        _signal(self._stopped, signal.SIGCONT)

    def replies(self) -> list[Reply]:
        """Return its answers in the order in which the jobs were sent, at most MAX_REPLIES.

        Raises:
            RuntimeError: it answered an unknown job, or one without tags.
        """
        answered = self._listener.arrivals.keys()
        if unknown := answered - set(self._sent):
            raise RuntimeError(f"expected answers to what was sent, {len(unknown)} are not, one is {unknown.pop()}")
        return traffic.read(self._place.client, [job_id for job_id in self._sent if job_id in answered][:MAX_REPLIES])


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True, slots=True)
class Participant:
    """A system that takes part in the turns."""

    player: Player
    ready_s: float
    """From the start of its processes until they take jobs, while the others are stopped."""
    warm_up: Drained
    """Figures of the backlog that warmed it."""
    memory_mib: float
    """GPU memory that it uses."""


@contextmanager
def taking_part(place: Place, system: System) -> Iterator[Participant]:
    """Start a system on its own server, warm it, and stop it by SIGSTOP."""
    with (
        watching(place.folder, system.name.replace(" ", "-")) as watch,
        Valkey(folder=place.folder / f"valkey-{system.name.replace(' ', '-')}") as server,
        server.client(socket_timeout=60) as client,
    ):
        own = replace(place, url=server.url, client=client)
        before, began_s = watch.since(), time.monotonic()
        with system.open(own) as running:
            ready_s = time.monotonic() - began_s
            warm_up = drain(own, running, seconds=WARM_UP_S).drained
            with traffic.listening(client) as listener:
                player = Player(own, running, listener, watch, per_second=warm_up.per_second)
                memory_mib = watch.since().memory_mib - before.memory_mib
                player.pause()
                try:
                    yield Participant(player, ready_s, warm_up, memory_mib)
                finally:
                    player.resume()  # a stopped process cannot end


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of two rates."""

    value: float
    error: float
    """Its standard error by the delete-one jackknife over the rounds (Efron 1982, The Jackknife, ch. 3); not a number
    for one round."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def paired(rounds: Sequence[tuple[Sequence[Turn], Sequence[Turn]]]) -> Ratio:
    """Return the ratio of both rates; each round holds turns of both that were close together in time."""

    def over(kept: Sequence[tuple[Sequence[Turn], Sequence[Turn]]]) -> float:
        own, other = ([turn for pair in kept for turn in pair[side]] for side in (0, 1))
        return ratio(rate(own), rate(other))

    count = len(rounds)
    if count < 2:
        return Ratio(over(rounds), math.nan)
    left_out = [over([*rounds[:number], *rounds[number + 1 :]]) for number in range(count)]
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in left_out))
    return Ratio(over(rounds), error)
